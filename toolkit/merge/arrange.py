"""Fit the models of a merge together: one vocabulary, aligned units, a source for every tensor of the output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from toolkit.checkpoints.layout import is_head
from toolkit.errors import Problem
from toolkit.merge.assemble import Piece, assemble
from toolkit.merge.inputs import Inputs
from toolkit.merge.spec import MergeSpec
from toolkit.merge.tokens import check_tokens
from toolkit.merge.vocabulary import Vocabulary, unify


@dataclass(frozen=True)
class Arranged:
    """What becomes of the models' tensors.

    Attributes:
        inputs: as they are merged: with one vocabulary, aligned.
        pieces: where every tensor comes from.
        config: what differs in the config from the donor's.
        vocabulary: of the output, where the spec has a tokenizer block.
    """

    inputs: Inputs
    pieces: Sequence[Piece] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: Vocabulary | None = None


def arrange(spec: MergeSpec, inputs: Inputs, *, whole: bool) -> tuple[Arranged, list[Problem]]:
    """Fit models together and return what does not fit.

    Args:
        spec: of the merge.
        inputs: its opened models.
        whole: whether all could be opened; else those that could are compared with each other alone.
    """
    if not all(group.models for group in inputs.groups):
        return Arranged(inputs), []
    vocabulary = None
    if spec.wanted_tokenizer:
        if not whole:
            return Arranged(inputs), []
        inputs, vocabulary, found = unify(spec, inputs)
        if found:
            return Arranged(inputs), found
    if spec.align is not None and whole:
        from toolkit.merge.align.inputs import aligned  # whose sums few merges need

        inputs, found = aligned(spec, inputs)
        if found:
            return Arranged(inputs), found
    pieces, config, found = assemble(inputs)
    if vocabulary is None:
        found += check_tokens(pieces, inputs.donor)
    return Arranged(inputs, pieces, config, vocabulary), found


def output_config(arranged: Arranged, names: Iterable[str]) -> dict[str, Any]:
    """Return what differs in the output's config from the donor's, given the names of the output's tensors."""
    config, donor = dict(arranged.config), arranged.inputs.donor
    if donor.ties_head and any(map(is_head, names)):
        config["tie_word_embeddings"] = False
    if arranged.vocabulary:
        size = {"vocab_size": arranged.vocabulary.size}
        inner = donor.config.get("text_config")
        if isinstance(inner, dict) and "vocab_size" in inner:
            return config | {"text_config": inner | config.get("text_config", {}) | size}
        config |= size
    return config
