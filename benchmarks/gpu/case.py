"""What is measured: an operation at some sizes, what else does the same, and what bounds all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tests.oracles import check_stick

Run = Callable[[], Sequence[torch.Tensor]]
"""Does the work once and returns what it writes; what is added to is among it."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Ceilings:
    """What a device was seen to do: bytes moved and operations of matrix products, per second."""

    bandwidth: float
    rate: float


@dataclass(frozen=True)
class Work:
    """The least that an operation has to do: every byte once, and multiplications and additions."""

    bytes: int
    operations: int = 0

    def seconds(self, ceilings: Ceilings) -> float:
        """Return the floor: whichever takes longer."""
        return max(self.bytes / ceilings.bandwidth, self.operations / ceilings.rate)


@dataclass(frozen=True)
class Op:
    """An operation of `toolkit.kernels`.

    Attributes:
        name: of its folder.
        inputs: makes tensors of some sizes on a device, in a dtype.
        bind: prepares the operation on them in a form ("triton", "reference").
        others: prepares what else does the same, by name; the first one is eager torch.
        work: the floor, for elements of so many bytes.
        small: odd sizes at which it is compared with float64 first.
        graph: whether it can be captured in a CUDA graph.
        exact: whether its reference in the same dtype is exact, as where codes are made.
        whole: results are judged as a whole, as gradients are: a row of theirs is often one rounded number times a
            vector.
    """

    name: str
    inputs: Callable[[Any, torch.device, torch.dtype], Tensors]
    bind: Callable[[Tensors, Any, Any], Run]
    others: Callable[[Tensors, Any], Mapping[str, Run]]
    work: Callable[[Any, int], Work]
    small: Sequence[Any]
    graph: bool = True
    exact: bool = False
    whole: bool = False

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        """Compare with float64 on the same inputs at small sizes, per row and per column.

        Raises:
            AssertionError: it is wrong.
        """
        for sizes in self.small:
            torch.manual_seed(0)
            tensors = self.inputs(sizes, device, dtype)
            wide = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
            copies = [{name: t.clone() for name, t in given.items()} for given in (tensors, tensors, wide)]
            got, eager = self.bind(copies[0], sizes, "triton")(), self.bind(copies[1], sizes, "reference")()
            exact = eager if self.exact else self.bind(copies[2], sizes, "reference")()
            for values in zip(got, exact, eager, strict=True):
                (check_whole if self.whole else check_stick)(*values)


@dataclass(frozen=True)
class Case:
    """An operation at sizes that matter.

    Attributes:
        op: which.
        name: of the sizes.
        sizes: as the operation takes them.
        cold: the second-level cache is flushed before every run, as other layers would.
        goal: most seconds, or least share of the floor, that is aimed at; "" is none.
    """

    op: Op
    name: str
    sizes: Any
    cold: bool = False
    goal: str = ""


def check_whole(got: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor) -> None:
    """Judge a result by the same rule as `check_stick`, but as a whole."""
    error, allowed = ((t.double() - exact.double()).norm() for t in (got, eager))
    assert error <= 2 * max(allowed, 0.5 * torch.finfo(got.dtype).eps * exact.double().norm())


def agree(got: Sequence[torch.Tensor], other: Sequence[torch.Tensor], *, whole: bool = False) -> None:
    """Check that two results are the same but for rounding: every row within 2% of the mean norm of rows.

    Args:
        got: one.
        other: the other.
        whole: compare all rows together.

    Raises:
        AssertionError: they are not.
    """
    for a, b in zip(got, other, strict=True):
        width = b.numel() if whole else b.shape[-1]
        error = (a.float() - b.float()).reshape(-1, width).norm(dim=1)
        size = b.float().reshape(-1, width).norm(dim=1)
        assert bool((error <= 0.02 * torch.maximum(size, size.mean())).all()), "the results of two forms differ"


def zeroed(run: Run) -> Sequence[torch.Tensor]:
    """Return what one run gives where it adds to zeros."""
    for tensor in run():
        tensor.zero_()
    return [tensor.clone() for tensor in run()]
