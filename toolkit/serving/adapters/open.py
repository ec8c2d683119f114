"""Tell what kind of folder an adapter is, and open it for the served model."""

from __future__ import annotations

from pathlib import Path

from toolkit.checkpoints.adapters import CONFIG, WEIGHTS, is_adapter
from toolkit.checkpoints.compressed import is_compressed, open_compressed, split_task
from toolkit.checkpoints.locate import locate
from toolkit.checkpoints.reader import read_json
from toolkit.errors import CheckpointError, MissingError
from toolkit.serving.adapters.contents import Source
from toolkit.serving.adapters.lora import open_lora
from toolkit.serving.adapters.others import open_other
from toolkit.serving.adapters.peft_kinds import Ia3Source, PrefixSource, PromptSource
from toolkit.serving.adapters.poly import PolySource
from toolkit.serving.adapters.target import Target
from toolkit.serving.adapters.tuned import CheckpointSource, CompressedSource, SharedTensors

_KINDS = {
    "LORA": open_lora,
    "IA3": Ia3Source,
    "PREFIX_TUNING": PrefixSource,
    "PROMPT_TUNING": PromptSource,
    "P_TUNING": PromptSource,
}


def open_source(source: str | Path, target: Target, shared: SharedTensors) -> Source:
    """Open an adapter, a fine-tune or a compressed delta and check that it fits the model.

    Args:
        source: a folder or hub id; `FOLDER#TASK` names one fine-tune, or task, of several.
        target: the served model.
        shared: tensors of fine-tunes.

    Raises:
        MissingError: nothing there.
        CheckpointError: broken, or made for another base.
        UnsupportedError: a kind that cannot be served.
    """
    place, task = split_task(str(source))
    folder = locate(place)
    if is_compressed(folder):
        compressed = open_compressed(source)
        with compressed.store:
            return CompressedSource(compressed, target, shared)
    if not is_adapter(folder):
        if not any(folder.glob("*.safetensors")):
            raise MissingError(f"{source}: neither {CONFIG} nor weights in this folder")
        return CheckpointSource(folder, str(source), target, shared)
    if not (folder / WEIGHTS).is_file():
        what = "only pickled weights" if (folder / "adapter_model.bin").is_file() else f"no {WEIGHTS}"
        raise CheckpointError(f"{source}: {what} in this folder")
    config = read_json(folder / CONFIG)
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        raise CheckpointError(f"{source}: {CONFIG}: peft_type: expected a name, got {kind!r}")
    if kind == "POLY":
        return PolySource(folder, task, target)
    if kind in _KINDS:
        return _KINDS[kind](folder, target, config)
    return open_other(folder, task, target, config)
