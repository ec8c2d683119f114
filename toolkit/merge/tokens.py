"""Whether the rows of embeddings and heads that are merged with each other mean the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from toolkit.checkpoints.reader import Checkpoint
from toolkit.checkpoints.tokenizers import other_tokens_of
from toolkit.errors import Problem
from toolkit.merge.assemble import Piece
from toolkit.merge.vocabulary import TOKENIZER_BLOCK, has_vocabulary


def check_tokens(pieces: Sequence[Piece], donor: Checkpoint) -> list[Problem]:
    """Find models whose embeddings or head are merged although their tokens are not those of the output's tokenizer.

    Tables of one size tell nothing: two tokenizers may number the same words in another order.

    Args:
        pieces: tensors of the output.
        donor: whose tokenizer the output has.
    """
    fault_of = cache(lambda folder: other_tokens_of(donor.folder, folder))
    found: dict[Problem, None] = {}
    for piece in pieces:
        if piece.group is None or not has_vocabulary(piece.name):
            continue
        for model in piece.group.models:
            fault = fault_of(model.weights.folder)
            if fault:
                message = f"its vocabulary is another: {fault} in {donor.source}; {TOKENIZER_BLOCK}"
                found[Problem(f"{model.slot.path}.model", message)] = None
    return list(found)
