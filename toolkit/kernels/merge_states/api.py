"""Exact merge of attention over several parts of the keys.

Shape suffixes: N parts, T queries, H heads, D features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.kernels.impl import Impl, resolve

if TYPE_CHECKING:
    import torch


def merge_states(
    out_NTHD: torch.Tensor, lse_NTH: torch.Tensor, *, impl: Impl | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what one softmax over the keys of all parts would have.

    The order of the parts is no matter, and a merge may be merged again. A part without keys is `(0, -inf)`; where no
    part has keys, so is the result.

    Args:
        out_NTHD: outputs of the parts.
        lse_NTH: logarithms of their sums of exponentials.
        impl: form to run.

    Returns:
        Outputs `[T, H, D]` in the dtype of the given ones, and `[T, H]` in the dtype of the given sums.

    Raises:
        ValueError: shapes that do not belong together.
        UnsupportedError: no such form on this device.
    """
    form = resolve(impl, ("triton", "reference"), out_NTHD.device, "merge_states")
    if out_NTHD.dim() != 4 or out_NTHD.shape[:3] != lse_NTH.shape:
        raise ValueError(f"outputs {tuple(out_NTHD.shape)} and sums {tuple(lse_NTH.shape)} of different queries")
    if form == "triton":
        from toolkit.kernels.merge_states.triton_form import merge_states as run
    else:
        from toolkit.kernels.merge_states.reference import merge_states as run
    return run(out_NTHD, lse_NTH)
