"""Merging on a torch device: methods run unchanged on arrays that take numpy's functions.

torch is imported by the modules of this package alone, and they only where a device is asked for.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from toolkit.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

SLICE = 1 << 22
"""Elements of every input that are worked on at a time: enough for what starting a kernel costs not to show."""

DEPTH = 2
"""Slices whose bytes are being read at once."""

_NAMES = re.compile(r"cuda(:\d+)?|auto|torch:cpu")


def find_device(name: str) -> str | None:
    """Return the name of a device that is there; `None` for the CPU, on which merging needs no torch.

    Args:
        name: `cpu`, `cuda`, `cuda:N`, `auto` for a GPU where there is one, or `torch:cpu`, which takes a GPU's way
            through the code on the CPU, for tests.

    Raises:
        UnsupportedError: no such device.
    """
    if name == "cpu":
        return None
    if not _NAMES.fullmatch(name):
        raise UnsupportedError(f"device {name!r} is not one of cpu, cuda, cuda:N, auto")
    import torch

    if name == "torch:cpu":
        return name
    count = torch.cuda.device_count()
    if name == "auto" and not count:
        return None
    found = "cuda" if name == "auto" else name
    if (open_device(found).index or 0) >= count:
        raise UnsupportedError(f"device {name}: torch {torch.__version__} finds {count} GPUs here")
    return found


def open_device(name: str) -> torch.device:
    """Return a device by the name that `find_device` gave it."""
    import torch

    return torch.device(name.removeprefix("torch:"))
