"""What is made of an adapter once it is trained: a merged model, a plain LoRA, an entry in a server's folder."""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.adapters.spec import TrainSpec
from toolkit.checkpoints.writer import check_free, staged
from toolkit.errors import UnsupportedError

if TYPE_CHECKING:
    from toolkit.models.load import LoadedModel


def check(spec: TrainSpec, folder: Path) -> None:
    """Refuse outputs that exist, before the first step.

    Raises:
        OutputError: one does.
    """
    for place in _places(spec, folder).values():
        check_free(place, overwrite=spec.after.overwrite)


def check_model(spec: TrainSpec, loaded: LoadedModel) -> None:
    """Refuse what cannot be made of the adapter on a model, before the first step.

    Raises:
        UnsupportedError: it does not merge, or is no pair of factors.
    """
    model: Any = loaded.model
    method = spec.adapter.method
    if spec.after.merge:
        if not hasattr(getattr(model, "base_model", None), "merge_and_unload"):
            raise UnsupportedError(f"after.merge: {method} changes no weights, so it cannot be merged; leave it out")
        if model.peft_config["default"].task_type != "CAUSAL_LM":
            raise UnsupportedError("after.merge: a classifier has a head of its own, no language model's; leave it out")
    if spec.after.lora and not _is_pair(model):
        raise UnsupportedError(
            f"after.lora: {method} is no method of the toolkit that is one LoRA exactly; leave it out"
        )


def _is_pair(model: Any) -> bool:
    from toolkit.adapters.methods._base import AdapterLayer

    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    try:
        for layer in layers:
            layer.low_rank("default")
    except UnsupportedError:
        return False
    return bool(layers)


def write(spec: TrainSpec, folder: Path) -> dict[str, Any]:
    """Make what a spec asks for of a finished adapter; return where each is.

    Args:
        spec: of the run.
        folder: of the adapter.
    """
    places = _places(spec, folder)
    if "merge" in places or "lora" in places:
        _write_from_model(spec, folder, places)
    if "serve" in places:
        with staged(places["serve"], overwrite=spec.after.overwrite) as partial:
            for file in sorted(folder.glob("adapter_*")):
                shutil.copyfile(file, partial / file.name)
    return {"after": {name: str(place) for name, place in places.items()}} if places else {}


def _write_from_model(spec: TrainSpec, folder: Path, places: dict[str, Path]) -> None:
    import torch
    from peft import PeftModel

    from toolkit.adapters.fold import fold
    from toolkit.models.load import load_model, quiet_transformers

    base = load_model(spec.base, dtype=torch.float32, trust_remote_code=spec.trust_remote_code)
    with quiet_transformers():
        own = deepcopy(base.model) if isinstance(spec.base, tuple) else base.model  # the user's stays as it is
        model: Any = PeftModel.from_pretrained(own, str(folder))
        if "lora" in places:
            fold(model, places["lora"], overwrite=spec.after.overwrite)
        if "merge" in places:
            merged = model.merge_and_unload()
            with staged(places["merge"], overwrite=spec.after.overwrite) as partial:
                merged.save_pretrained(partial)
                base.tokenizer.save_pretrained(partial)


def _places(spec: TrainSpec, folder: Path) -> dict[str, Path]:
    after = spec.after
    found = {"merge": after.merge, "lora": after.lora, "serve": after.serve and str(Path(after.serve) / folder.name)}
    return {name: Path(place) for name, place in found.items() if place}
