"""Add to every row of a batch what its own fine-tune changed of a linear, from one bit per weight.

Shape suffixes: T rows, K input features, N output features, S fine-tunes, B bytes of a row of bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit.kernels.impl import Impl, resolve

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BitDeltas:
    """What several fine-tunes changed of one linear, `[N, K]` each, never written out.

    With a vector, a change is `scale * bit * vector`: the masks of Wang et al., "Localizing Task Information for
    Improved Model Merging and Compression", 2024 (arXiv:2405.07813), whose vector all fine-tunes share. Without, it is
    `scale` where the bit is set and `-scale` elsewhere: Liu et al., "BitDelta: Your Fine-Tune May Only Be Worth One
    Bit", 2024 (arXiv:2402.10193).

    Attributes:
        bits_SNB: uint8 `[S, N, ceil(K / 8)]`, contiguous. The first feature is the lowest bit of a row's first byte;
            every row begins with a byte of its own, and what fills its last one is not looked at.
        scale_SN: float32 `[S, N]`, or `[S, 1]` where all outputs have the same.
        vector_NK: of any floating type, or `None` where bits are signs; features lie next to each other.
    """

    bits_SNB: torch.Tensor
    scale_SN: torch.Tensor
    vector_NK: torch.Tensor | None = None

    @classmethod
    def of_one(
        cls, bits: torch.Tensor, shape: tuple[int, int], scale: torch.Tensor | None, vector: torch.Tensor | None
    ) -> BitDeltas:
        """Take one fine-tune's bits as `checkpoints.compressed` stores them: all rows in one run of bytes.

        Args:
            bits: uint8 `[ceil(N * K / 8)]`; kept as it is where rows fill whole bytes, else copied row by row.
            shape: N and K.
            scale: of one element or N of them; `None` is 1.
            vector: `[N, K]`, or `None`.
        """
        import torch

        from toolkit.kernels.delta_linear.bits import split_rows

        scale = torch.ones(1, device=bits.device) if scale is None else scale.float()
        return cls(split_rows(bits, *shape)[None], scale.view(1, -1), vector)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        parts = (self.bits_SNB, self.scale_SN, *(() if self.vector_NK is None else (self.vector_NK,)))
        return sum(part.nbytes for part in parts)


def delta_linear(
    y_TN: torch.Tensor,
    x_TK: torch.Tensor,
    tasks: Sequence[int],
    deltas: BitDeltas,
    *,
    impl: Impl | None = None,
) -> None:
    """Compute `y += scale * change x` in place, for each row with the change of its own fine-tune.

    So `y`, which holds `W x` of all rows by one product, becomes `(W + change) x`. Rows without a fine-tune stay as
    they are, bit for bit. Sums are float32.

    Args:
        y_TN: the linear's own output, overwritten; features lie next to each other, rows anywhere.
        x_TK: its input, likewise.
        tasks: of each row, its fine-tune among the S; -1 is none.
        deltas: of all fine-tunes.
        impl: form to run.

    Raises:
        ValueError: tensors that do not fit each other, or a fine-tune that is not there.
        UnsupportedError: no such form on this device.
    """
    form = resolve(impl, ("triton", "torch", "reference"), x_TK.device, "delta_linear")
    _check(y_TN, x_TK, tasks, deltas)
    if form == "triton":
        from toolkit.kernels.delta_linear.triton_form import delta_linear as run
    elif form == "torch":
        from toolkit.kernels.delta_linear.torch_form import delta_linear as run
    else:
        from toolkit.kernels.delta_linear.reference import delta_linear as run
    run(y_TN, x_TK, tasks, deltas)


def _check(y_TN: torch.Tensor, x_TK: torch.Tensor, tasks: Sequence[int], deltas: BitDeltas) -> None:
    count, outputs, row = deltas.bits_SNB.shape
    rows, width = x_TK.shape
    if tuple(y_TN.shape) != (rows, outputs) or row != -(-width // 8) or len(tasks) != rows:
        given = f"input {tuple(x_TK.shape)}, output {tuple(y_TN.shape)} and fine-tunes of {len(tasks)} rows"
        raise ValueError(f"{given} do not fit bits {tuple(deltas.bits_SNB.shape)}")
    if tuple(deltas.scale_SN.shape) not in ((count, outputs), (count, 1)):
        raise ValueError(f"scales {tuple(deltas.scale_SN.shape)} for {count} fine-tunes and {outputs} outputs")
    if deltas.vector_NK is not None and tuple(deltas.vector_NK.shape) != (outputs, width):
        raise ValueError(f"a vector {tuple(deltas.vector_NK.shape)} for weights {(outputs, width)}")
    if y_TN.dtype != x_TK.dtype:
        raise ValueError(f"input and output of different types: {x_TK.dtype}, {y_TN.dtype}")
    near = (y_TN, x_TK, *(() if deltas.vector_NK is None else (deltas.vector_NK,)))
    if any(t.stride(-1) != 1 for t in near if t.shape[-1] > 1) or not deltas.bits_SNB.is_contiguous():
        raise ValueError("features of inputs, outputs and the vector must lie next to each other, bits without gaps")
    if rows and not -1 <= min(tasks) <= max(tasks) < count:
        raise ValueError(f"rows of fine-tunes {min(tasks)} to {max(tasks)}; there are {count}, and -1 is none")
