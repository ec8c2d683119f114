"""The models that are fused: loaded, checked to share a vocabulary, and read token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.checkpoints.adapters import is_adapter
from toolkit.checkpoints.dtypes import by_torch_name
from toolkit.checkpoints.locate import locate
from toolkit.errors import Problem, SpecError, UnsupportedError
from toolkit.models.load import LoadedModel, load_model, pick_device
from toolkit.routing.fusion.spec import FusionSpec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def load_all(spec: FusionSpec) -> tuple[LoadedModel, LoadedModel, list[LoadedModel]]:
    """Load the large model, the small base and the experts.

    Raises:
        SpecError: one has another vocabulary than the large one.
        MissingError: no model there.
        CheckpointError: weights that are broken or not those of the config.
        UnsupportedError: no causal language model, or an adapter that cannot be merged into the small base.
    """
    import torch

    form = by_torch_name(spec.dtype) if spec.dtype else None
    if form and not form.floating:
        raise UnsupportedError(f"dtype {spec.dtype!r} is not one that a model can run in; use bfloat16 or float32")
    options: dict[str, Any] = {"device": pick_device(spec.device), "trust_remote_code": spec.trust_remote_code}
    options |= {"dtype": getattr(torch, form.torch)} if form else {}
    large, base = load_model(spec.large, **options), load_model(spec.base, **options)
    experts = {name: _expert(source, spec.base, base, options) for name, source in spec.experts.items()}
    check_vocabularies(large, {"base": base, **{f"experts.{name}": one for name, one in experts.items()}})
    return large, base, list(experts.values())


def _expert(source: Any, base: Any, small: LoadedModel, options: dict[str, Any]) -> LoadedModel:
    if not isinstance(source, str) or not is_adapter(locate(source)):
        return load_model(source, **options)
    if not isinstance(base, str):
        raise UnsupportedError(f"{source}: an adapter, which needs the small base as a folder or hub id")
    from toolkit.adapters.convert import load_adapted

    adapted: Any = load_adapted(source, base, **options)
    try:
        return LoadedModel(source, adapted.merge_and_unload(), small.tokenizer)
    except (AttributeError, NotImplementedError):
        kind = adapted.active_peft_config.peft_type
        raise UnsupportedError(f"{source}: an adapter of type {kind} cannot be merged into the small base") from None


def check_vocabularies(large: LoadedModel, others: dict[str, LoadedModel]) -> None:
    """Check that token ids mean the same to all models.

    Raises:
        SpecError: they do not; with every model of which that is so.
    """
    own, problems = _vocabulary(large), []
    for where, model in others.items():
        found = _vocabulary(model)
        if found != own:
            apart = len(own.items() ^ found.items())
            message = f"{apart} entries of its vocabulary are not those of the large model; fused models share one"
            problems.append(Problem(where, message))
    if problems:
        raise SpecError(problems)


def _vocabulary(model: LoadedModel) -> dict[str, int]:
    tokenizer: Any = model.tokenizer
    return tokenizer.get_vocab()


class Reader:
    """A model that follows what another one generates, keeping its own cache; one sequence at a time.

    Args:
        model: a causal language model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._cache, self._seen = None, 0

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the next token's logits, `[1, V]` float32, after ids `[1, L]` that go on from the last call's."""
        new = ids[:, self._seen :].to(self.model.device)
        found: Any = self.model(input_ids=new, past_key_values=self._cache, use_cache=True)
        self._cache, self._seen = found.past_key_values, ids.shape[1]
        return found.logits[:, -1].float().to(ids.device)
