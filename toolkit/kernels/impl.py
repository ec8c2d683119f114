"""Which form of an operation runs: chosen by the caller or by the device, never silently replaced by another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from toolkit.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

Impl = Literal["reference", "torch", "triton"]


def resolve(impl: Impl | None, offered: Sequence[Impl], device: torch.device, op: str) -> Impl:
    """Return the form to run.

    Args:
        impl: what the caller wants; `None` takes the fastest that the device runs.
        offered: forms that the operation has, fastest first; "triton" is the fastest on a GPU only.
        device: of the tensors.
        op: name of the operation, for the error.

    Raises:
        UnsupportedError: the operation has no such form.
    """
    if impl is None:
        return next(form for form in offered if form != "triton" or device.type == "cuda")
    if impl not in offered:
        raise UnsupportedError(f"{op} has no form {impl!r} for {device.type} (known: {', '.join(offered)})")
    return impl
