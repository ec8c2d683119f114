"""Checkpoints read by other names than they are stored by.

transformers 5 renames and fuses some weights when it loads a model (experts become one `gate_up_proj`), and writes
them back by the same mapping unless it is told not to. That mapping is used here. And some released checkpoints, such
as GPT-2's, lack the first word of the names that transformers and PEFT use.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from typing_extensions import override

from toolkit.checkpoints.dtypes import Bytes, Floats, decode
from toolkit.checkpoints.headers import TensorInfo
from toolkit.checkpoints.layout import is_head
from toolkit.checkpoints.reader import Checkpoint
from toolkit.checkpoints.view import CheckpointView

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def by_released_names(checkpoint: Checkpoint) -> Checkpoint | None:
    """Return a checkpoint as its architecture's released ones name it; `None` if it is so, or if nothing is known."""
    model = _empty_model(checkpoint)
    if model is None or not set(checkpoint.tensors) <= set(model.state_dict()):
        return None
    view = ReleasedCheckpoint(checkpoint, model)
    return view if set(view.tensors) != set(checkpoint.tensors) else None


def _empty_model(checkpoint: Checkpoint) -> PreTrainedModel | None:
    """Return the model of a config without any weights; `None` if transformers cannot make it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(checkpoint.config)
    try:
        config = AutoConfig.for_model(settings.pop("model_type", ""), **settings)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception:  # a config raises anything; then names are compared as they are
        return None


class ReleasedCheckpoint(CheckpointView):
    """A checkpoint whose tensors are renamed, and cut from those that were fused.

    One fused tensor at a time is in memory, with what was cut from it.

    Args:
        inner: as it is stored.
        model: of its architecture, without weights.
    """

    def __init__(self, inner: Checkpoint, model: PreTrainedModel) -> None:
        super().__init__(inner)
        self.model = model
        tensors: dict[str, TensorInfo] = {}
        self._origin: dict[str, tuple[str, bool]] = {}
        for name, info in inner.tensors.items():
            made = self._converted(name, _meta(info))
            for new, value in made.items():
                shape = tuple(value.shape)
                tensors[new] = TensorInfo(new, info.dtype, shape, info.file, info.offset)
                self._origin[new] = name, len(made) == 1 and shape == info.shape
        self.tensors = tensors
        self._lock = threading.Lock()
        self._made: tuple[str, dict[str, torch.Tensor]] = "", {}

    def _converted(self, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self.model, {name: value})

    def _raw(self, name: str) -> Bytes:
        """Return all bytes of a tensor that is cut from another."""
        import torch

        origin, _ = self._origin[name]
        with self._lock:
            if self._made[0] != origin:
                self._made = origin, self._converted(origin, self.inner.tensor(origin))
            value = self._made[1][name].contiguous().view(-1)
        return value.view(torch.uint8).numpy()

    @override
    def _inside(self, name: str) -> str:
        return self._origin[self._stored(name)][0]

    @override
    def read_raw(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        stored = self._stored(name)
        if self._origin[stored][1]:
            return super().read_raw(name, start, stop)
        info = self.tensors[stored]
        last = info.count if stop is None else stop
        return self._raw(stored)[info.dtype.nbytes(start) : info.dtype.nbytes(last)]

    @override
    def read(self, name: str, start: int, stop: int, out: Floats) -> None:
        decode(np.ascontiguousarray(self.read_raw(name, start, stop)), self.info(name).dtype, out)

    @override
    def read_bytes(self, name: str) -> int:
        return self.info(name).nbytes

    @property
    @override
    def buffer_bytes(self) -> int:
        return 2 * max((info.nbytes for info in self.inner.tensors.values()), default=0)


def _meta(info: TensorInfo) -> torch.Tensor:
    import torch

    dtype = getattr(torch, info.dtype.torch or "uint8")
    return torch.empty(info.shape, dtype=dtype, device="meta")


class PrefixedCheckpoint(CheckpointView):
    """A checkpoint whose names lack the first word that the causal language model of its architecture puts before them.

    Args:
        inner: as it is stored, such as the hub's GPT-2.
        prefix: the word and a dot.
    """

    def __init__(self, inner: Checkpoint, prefix: str) -> None:
        super().__init__(inner)
        self.prefix = prefix
        renamed = {(name if is_head(name) else prefix + name): info for name, info in inner.tensors.items()}
        self.tensors = {name: replace(info, name=name) for name, info in renamed.items()}

    @override
    def _inside(self, name: str) -> str:
        return self._stored(name).removeprefix(self.prefix)


def with_prefix(checkpoint: Checkpoint, names: Iterable[str]) -> Checkpoint:
    """Put the first word of some names before a checkpoint's own, if that is all that they differ in."""
    wanted = [name for name in names if not is_head(name)]
    prefix = wanted[0].partition(".")[0] + "." if wanted else ""
    own = set(checkpoint.tensors)
    if any(name in own or not name.startswith(prefix) or name.removeprefix(prefix) not in own for name in wanted):
        return checkpoint
    return PrefixedCheckpoint(checkpoint, prefix)
