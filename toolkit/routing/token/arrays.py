"""Small float32 tensors as safetensors, which routers and gates are kept in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from toolkit.checkpoints.dtypes import DTYPES
from toolkit.checkpoints.headers import TensorInfo
from toolkit.checkpoints.reader import open_checkpoint
from toolkit.checkpoints.writer import write_weights


def write_arrays(folder: Path, stem: str, arrays: Mapping[str, Tensor]) -> None:
    """Write tensors to `{stem}.safetensors`."""
    flat = {name: value.detach().cpu().float().contiguous() for name, value in arrays.items()}
    tensors = [TensorInfo(name, DTYPES["F32"], tuple(value.shape)) for name, value in flat.items()]
    raw = {name: value.numpy().reshape(-1).view(np.uint8) for name, value in flat.items()}
    write_weights(folder, tensors, raw, stem=stem)


def read_arrays(folder: Path, stem: str) -> dict[str, Tensor]:
    """Read them.

    Raises:
        MissingError: no such file.
        CheckpointError: it is broken.
    """
    with open_checkpoint(folder / f"{stem}.safetensors") as weights:
        return {name: weights.tensor(name).to(torch.float32) for name in weights.tensors}
