"""Several processes of one run, as `accelerate launch` starts them: each trains a part of every step's rows."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def world() -> int:
    """Return how many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process; 0 is the one that writes."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Tell whether this process writes and shows."""
    return rank() == 0


def wait(device: torch.device) -> None:
    """Go on once every process is here."""
    if world() > 1:
        from accelerate import PartialState

        PartialState(cpu=device.type == "cpu").wait_for_everyone()


def own_device(device: torch.device) -> torch.device:
    """Return this process's device among several of a kind."""
    import torch

    if world() == 1 or device.type == "cpu" or device.index is not None:
        return device
    return torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))
