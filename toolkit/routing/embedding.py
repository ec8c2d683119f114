"""Texts to vectors, for routers that look at prompts: the hidden states of a base model, or of any encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from pydantic import Field

from toolkit.checkpoints.reader import open_checkpoint
from toolkit.models.load import LoadedModel, load_encoder, load_model, model_folder, pick_device
from toolkit.routing.ops import Vectors
from toolkit.specs import FolderOrObject, Spec


class EmbeddingSpec(Spec):
    """Where prompt vectors come from.

    Attributes:
        model: a base model or an encoder: a folder, a hub id, `toolkit:base`.
        layer: whose hidden states are averaged over the tokens; -1 is the last, 0 the token embeddings.
        max_length: tokens of a prompt that are looked at.
        prefix: put before every prompt, such as the instruction that an encoder was trained with.
        trust_remote_code: run code that comes with the model; never saved with a router.
    """

    model: FolderOrObject
    layer: int = -1
    max_length: Annotated[int, Field(ge=1)] = 512
    prefix: str = ""
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
    prefix: str = ""

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """Embed texts."""
        from toolkit.models.hidden import mean_hidden_states

        texts = [self.prefix + text for text in texts]
        means = mean_hidden_states(self.model, self.tokenizer, texts, layer=self.layer, max_length=self.max_length)
        return means.numpy()


def open_embedder(spec: EmbeddingSpec, *, device: str = "auto", trust_remote_code: bool | None = None) -> HiddenStates:
    """Load the model of an embedding: a causal language model, or any encoder that transformers knows.

    Args:
        spec: what to load.
        device: where to put it.
        trust_remote_code: run code that comes with the model; by default what the spec says. A spec that was read
            from a file of somebody else's must not decide this.

    Raises:
        MissingError: no model there.
        CheckpointError: pickled or broken weights.
        UnsupportedError: not a model that transformers knows, or one that needs its own code.
    """
    if isinstance(spec.model, LoadedModel | tuple):
        loaded = load_model(spec.model)
        return HiddenStates(loaded.model, loaded.tokenizer, spec.layer, spec.max_length, spec.prefix)
    trusted = spec.trust_remote_code if trust_remote_code is None else trust_remote_code
    with open_checkpoint(model_folder(spec.model, code=trusted)) as checkpoint:
        architecture = checkpoint.architecture or ""
    load = load_model if "CausalLM" in architecture or "LMHead" in architecture else load_encoder
    loaded = load(spec.model, device=pick_device(device), trust_remote_code=trusted)
    return HiddenStates(loaded.model, loaded.tokenizer, spec.layer, spec.max_length, spec.prefix)
