"""Add to every row of a batch the change that its own adapter makes.

Shape suffixes: T rows, K input features, N output features, r rank of one adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit.kernels.impl import Impl, resolve

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Pair:
    """The factors of one adapter at one linear.

    Attributes:
        a_rK: first factor.
        b_Nr: second factor, the scale folded in.
        gain_N: DoRA's factor per output on `W x + B A x`, or `None` for LoRA.
    """

    a_rK: torch.Tensor
    b_Nr: torch.Tensor
    gain_N: torch.Tensor | None = None


@dataclass(frozen=True)
class Segment:
    """Consecutive rows that one adapter works on; a row may lie in several segments.

    Attributes:
        start: first row.
        stop: row after the last.
        adapter: key of the adapter.
        weight: of its change; only a LoRA's can be other than 1.
    """

    start: int
    stop: int
    adapter: str
    weight: float = 1.0


def grouped_lora(
    y_TN: torch.Tensor,
    x_TK: torch.Tensor,
    segments: Sequence[Segment],
    pairs: Mapping[str, Pair],
    bias_N: torch.Tensor | None = None,
    *,
    impl: Impl | None = None,
) -> None:
    """Compute `y += weight * B (A x)` in place for the rows of every segment.

    Rows in no segment, and segments whose adapter has no pair here, stay as they are, bit for bit. With a gain,
    `y = gain * (y - bias + B (A x)) + bias`, which is DoRA.

    Args:
        y_TN: the linear's own output, overwritten.
        x_TK: its input.
        segments: which adapter works on which rows.
        pairs: factors by adapter key.
        bias_N: the linear's bias, already in `y`.
        impl: form to run.

    Raises:
        ValueError: a DoRA in a segment whose weight is not 1, or in rows that another segment covers.
    """
    form = resolve(impl, ("torch", "reference"), x_TK.device, "grouped_lora")
    present = [s for s in segments if s.adapter in pairs and s.stop > s.start]
    _check_dora(present, pairs)
    if form == "torch":
        from toolkit.kernels.grouped_lora.torch_form import grouped_lora as run
    else:
        from toolkit.kernels.grouped_lora.reference import grouped_lora as run
    run(y_TN, x_TK, present, pairs, bias_N)


def _check_dora(segments: Sequence[Segment], pairs: Mapping[str, Pair]) -> None:
    for dora in (s for s in segments if pairs[s.adapter].gain_N is not None):
        shared = any(s is not dora and s.start < dora.stop and dora.start < s.stop for s in segments)
        if dora.weight != 1 or shared:
            raise ValueError(
                "a DoRA rescales the whole output, so it cannot be weighted or combined with another adapter"
            )
