"""Texts to vectors, for routers that look at prompts: the hidden states of a base model, or of any encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from toolkit.checkpoints.locate import locate
from toolkit.checkpoints.reader import read_json
from toolkit.errors import MissingError
from toolkit.models.load import LoadedModel, load_model, load_tokenizer, pick_device, quiet_transformers
from toolkit.specs import Spec

Vectors = NDArray[np.float32]


class EmbeddingSpec(Spec):
    """Where prompt vectors come from.

    Attributes:
        model: a base model or an encoder: a folder, a hub id, `toolkit:base`.
        layer: whose hidden states are averaged over the tokens; -1 is the last, 0 the token embeddings.
        max_length: tokens of a prompt that are looked at.
        trust_remote_code: run code that comes with the model.
    """

    model: Any
    layer: int = -1
    max_length: Annotated[int, Field(ge=1)] = 512
    trust_remote_code: bool = False


class Embedder(Protocol):
    """Turns texts into vectors."""

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """Return `[len(texts), H]` float32."""
        ...


@dataclass(frozen=True)
class HiddenStates:
    """Mean hidden states of a loaded model; see `mean_hidden_states`."""

    model: Any
    tokenizer: Any
    layer: int = -1
    max_length: int = 512

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """Embed texts."""
        from toolkit.models.hidden import mean_hidden_states

        means = mean_hidden_states(self.model, self.tokenizer, texts, layer=self.layer, max_length=self.max_length)
        return means.numpy()


def open_embedder(spec: EmbeddingSpec, *, device: str = "auto") -> HiddenStates:
    """Load the model of an embedding: a causal language model, or any encoder that transformers knows."""
    if isinstance(spec.model, LoadedModel | tuple):
        loaded = load_model(spec.model)
        return HiddenStates(loaded.model, loaded.tokenizer, spec.layer, spec.max_length)
    path = locate(spec.model)
    config = path / "config.json"
    if not config.is_file():
        raise MissingError(f"{spec.model}: no config.json in this folder, so it is no encoder")
    architectures = read_json(config).get("architectures") or [""]
    where = pick_device(device)
    if "CausalLM" in architectures[0] or "LMHead" in architectures[0]:
        loaded = load_model(spec.model, device=where, trust_remote_code=spec.trust_remote_code)
        return HiddenStates(loaded.model, loaded.tokenizer, spec.layer, spec.max_length)
    from transformers import AutoModel

    with quiet_transformers():
        model = AutoModel.from_pretrained(path, trust_remote_code=spec.trust_remote_code).to(where).eval()
    tokenizer = load_tokenizer(spec.model, trust_remote_code=spec.trust_remote_code)
    return HiddenStates(model, tokenizer, spec.layer, spec.max_length)
