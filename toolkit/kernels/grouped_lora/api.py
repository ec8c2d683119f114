"""Add to every row of a batch the change that its own adapter makes.

Shape suffixes: T rows, K input features, N output features, r rank of one adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit.kernels.impl import Impl, resolve

if TYPE_CHECKING:
    import torch

    from toolkit.kernels.grouped_lora.pages import PagedPairs
    from toolkit.kernels.grouped_lora.routes import Routes

MAX_LINEARS = 3
"""Linears that one launch serves: q, k and v."""


@dataclass(frozen=True)
class Pair:
    """The factors of one adapter at one linear.

    Attributes:
        a_rK: first factor.
        b_Nr: second factor.
        gain_N: DoRA's factor per output on the changed linear's output, or `None` for LoRA.
        scale: of the product; kept apart so that it is not rounded to the dtype of the factors.
        bias_N: added to `B (A x)` before it is scaled, as PEFT's `lora_bias` does.
    """

    a_rK: torch.Tensor
    b_Nr: torch.Tensor
    gain_N: torch.Tensor | None = None
    scale: float = 1.0
    bias_N: torch.Tensor | None = None


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
    """Compute `y += weight * scale * B (A x)` in place for the rows of every segment.

    Rows in no segment, and segments whose adapter has no pair here, stay as they are, bit for bit. With a gain,
    `y = gain * (y - bias + scale * B (A x)) + bias`, which is DoRA. Factors lie anywhere in memory, which is why there
    is no Triton form; `paged_lora` has one.

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


def paged_lora(
    ys: Sequence[torch.Tensor],
    x: torch.Tensor,
    routes: Routes,
    pairs: PagedPairs,
    biases: Sequence[torch.Tensor | None] | None = None,
    *,
    impl: Impl | None = None,
) -> None:
    """Compute the same in place for all linears that read `x`, with factors in the pages of a pool.

    Rows without an adapter stay as they are, bit for bit. A row's inner products are rounded to the dtype of `x` where
    they go through tensor cores, as they are when torch multiplies twice; in float16 they must not exceed its range.

    Args:
        ys: output `[T, N]` of each linear, overwritten; features lie next to each other, rows anywhere.
        x: `[T, K]`, likewise; or `[T]` int64, ids of rows of an embedding, whose A is `[r, vocabulary]`.
        routes: which adapters work on which rows; of a mixture, LoRAs on linears that every row has in common.
        pairs: factors of all adapters at these linears.
        biases: of each linear, already in `ys`; what a DoRA must not rescale.
        impl: form to run.

    Raises:
        ValueError: tensors that do not fit each other, or a DoRA that is weighted or combined.
        UnsupportedError: no such form on this device.
    """
    run = paged_lora_form(x.device, impl)
    biases = biases or [None] * (len(pairs.widths) - 1)
    _check_tensors(ys, x, routes, pairs, biases)
    routes.check_dora(pairs)
    if routes.mixture is not None:
        _check_mixture(routes, pairs, x)
    run(ys, x, routes, pairs, biases)


def paged_lora_form(device: torch.device, impl: Impl | None = None) -> Callable[..., None]:
    """Return what `paged_lora` runs once it has checked its arguments, for callers whose own fit by construction.

    An engine calls it at every linear in every step. Its arguments are those of `paged_lora`, in order and without
    `impl`; biases must be given.

    Args:
        device: of the tensors.
        impl: form to run.

    Raises:
        UnsupportedError: no such form on this device.
    """
    form = resolve(impl, ("triton", "torch", "reference"), device, "paged_lora")
    if form == "triton":
        from toolkit.kernels.grouped_lora.triton_form import paged_lora as run
    elif form == "torch":
        from toolkit.kernels.grouped_lora.torch_form import paged_lora as run
    else:
        from toolkit.kernels.grouped_lora.reference import paged_lora as run
    return run


def paged_lora_backward(
    dys: Sequence[torch.Tensor],
    x_TK: torch.Tensor,
    routes: Routes,
    pairs: PagedPairs,
    *,
    impl: Impl | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of what `paged_lora` adds, for training several adapters in one batch.

    Args:
        dys: gradient of each output, `[T, N]`.
        x_TK: the linears' input.
        routes: as forward; their weights get no gradient.
        pairs: as forward, LoRAs only.
        impl: form to run.

    Returns:
        The gradient of `x`, and float32 `[pages, page]`: the gradient of every element of the pool, 0 elsewhere.

    Raises:
        ValueError: tensors that do not fit each other, or an adapter with a bias or a gain.
        UnsupportedError: no such form on this device.
    """
    form = resolve(impl, ("triton", "reference"), x_TK.device, "paged_lora_backward")
    _check_tensors(dys, x_TK, routes, pairs, [None] * (len(pairs.widths) - 1))
    if pairs.has_extras[routes.slots[routes.slots >= 0]].any() or routes.mixture is not None:
        raise ValueError("no gradients of biases, of DoRA's gains and of mixtures")
    if form == "triton":
        from toolkit.kernels.grouped_lora.triton_form import paged_lora_backward as run
    else:
        from toolkit.kernels.grouped_lora.reference import paged_lora_backward as run
    return run(dys, x_TK, routes, pairs)


def _check_tensors(
    ys: Sequence[torch.Tensor],
    x: torch.Tensor,
    routes: Routes,
    pairs: PagedPairs,
    biases: Sequence[torch.Tensor | None],
) -> None:
    rows, width, *widths = len(routes.slots), *pairs.widths
    if not 1 <= len(widths) <= MAX_LINEARS:
        raise ValueError(f"{len(widths)} linears at once, at most {MAX_LINEARS}")
    given, wanted = [tuple(y.shape) for y in ys], [(rows, n) for n in widths]
    if given != wanted or tuple(x.shape) not in ((rows, width), (rows,)):
        raise ValueError(f"input {tuple(x.shape)} and outputs {given}, expected {(rows, width)} and {wanted}")
    given = [(n,) if bias is None else tuple(bias.shape) for n, bias in zip(widths, biases, strict=True)]
    if given != [(n,) for n in widths]:
        raise ValueError(f"biases of shapes {given} for outputs {wanted}")
    dtypes = {t.dtype for t in (*ys, pairs.pool, *(b for b in biases if b is not None), *([x] if x.dim() == 2 else []))}
    if len(dtypes) > 1:
        raise ValueError(f"tensors of different types: {', '.join(sorted(str(d) for d in dtypes))}")
    if any(t.stride(-1) != 1 for t in (*ys, x) if t.shape[-1] > 1):
        raise ValueError("features of inputs and outputs must lie next to each other")


def _check_mixture(routes: Routes, pairs: PagedPairs, x: torch.Tensor) -> None:
    assert routes.mixture is not None
    given, wanted = tuple(routes.mixture.shape), (len(pairs.widths) - 1, *routes.slots.shape)
    if given != wanted:
        raise ValueError(f"a mixture of shape {given}, expected {wanted}")
    extra = [s for s in routes.slots[:1].ravel().tolist() if s in pairs.versions and s not in pairs.plain]
    if x.dim() != 2 or extra:
        raise ValueError("only LoRAs without biases, on linears, can be mixed")


def _check_dora(segments: Sequence[Segment], pairs: Mapping[str, Pair]) -> None:
    for dora in (s for s in segments if pairs[s.adapter].gain_N is not None):
        shared = any(s is not dora and s.start < dora.stop and dora.start < s.stop for s in segments)
        if dora.weight != 1 or shared:
            raise ValueError(DORA_ALONE)


DORA_ALONE = "a DoRA rescales the whole output, so it cannot be weighted or combined with another adapter"
