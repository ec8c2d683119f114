"""Attention of many queries: prefill with and without a cached prefix, and training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.case import Case, Op, Run, Tensors, Work
from benchmarks.gpu.shapes import Shape
from toolkit.kernels.prefill_attention import packed_attention, prefill_attention


@dataclass(frozen=True)
class Sizes:
    """Sequences of one length.

    Attributes:
        sequences: how many.
        queries: of each, its last tokens.
        length: tokens of each.
        heads: of queries.
        kv_heads: of keys and values.
        size: features of a head.
        page: tokens of a page.
        window: tokens that a query sees; 0 is all.
        soft_cap: of scores; 0 is none.
        shared: first tokens that lie in the same pages for all sequences.
        bits: of quantised keys and values; 0 is none.
    """

    sequences: int
    queries: int
    length: int
    heads: int
    kv_heads: int
    size: int
    page: int = 16
    window: int = 0
    soft_cap: float = 0
    shared: int = 0
    bits: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """What all forms of attention take."""
        cap, window = self.soft_cap or None, self.window or None
        return {"scale": self.size**-0.5, "soft_cap": cap, "window": window}

    @property
    def starts(self) -> list[int]:
        """First query row of each sequence, and all of them."""
        return list(range(0, (self.sequences + 1) * self.queries, self.queries))

    @property
    def pages(self) -> int:
        """Of a sequence."""
        return -(-self.length // self.page)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [self.length] * self.sequences


def inputs(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Tensors:
    """Make queries, and keys and values in pages in any order."""
    shared = sizes.shared // sizes.page
    own = sizes.pages - shared
    order = torch.randperm(shared + sizes.sequences * own, device=device)
    tables = [torch.cat([order[:shared], row]) for row in order[shared:].view(sizes.sequences, own)]
    shape = (len(order), sizes.page, sizes.kv_heads, sizes.size)
    rows = sizes.sequences * sizes.queries
    found = {"q": torch.randn(rows, sizes.heads, sizes.size, device=device, dtype=dtype), "tables": torch.stack(tables)}
    return found | {name: torch.randn(shape, device=device, dtype=dtype) for name in ("k", "v")}


def together(tensors: Tensors, sizes: Sizes) -> list[torch.Tensor]:
    """Return queries, keys and values as `[S, heads, tokens, D]`, copied out of their pages."""
    q = tensors["q"].view(sizes.sequences, sizes.queries, sizes.heads, sizes.size).transpose(1, 2)
    kv = (tensors[name][tensors["tables"]].flatten(1, 2)[:, : sizes.length].transpose(1, 2) for name in ("k", "v"))
    return [q, *(t.contiguous() for t in kv)]


def seen(sizes: Sizes, device: torch.device) -> torch.Tensor:
    """Return `[queries, length]`: which tokens are seen."""
    query = torch.arange(sizes.length - sizes.queries, sizes.length, device=device)[:, None]
    key = torch.arange(sizes.length, device=device)
    near = key > query - sizes.window if sizes.window else torch.ones_like(key, dtype=torch.bool)
    return (key <= query) & near


def flat(out: torch.Tensor) -> list[torch.Tensor]:
    """Return `[S, heads, queries, D]` as the kernels do."""
    return [out.transpose(1, 2).flatten(0, 1).flatten(1)]


def eager(tensors: Tensors, sizes: Sizes) -> Run:
    """Write all scores down."""
    q, k, v = together(tensors, sizes)
    mask = seen(sizes, q.device)

    def run() -> list[torch.Tensor]:
        group = sizes.heads // sizes.kv_heads
        wide = (t.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2) for t in (k, v))
        keys, values = wide
        scores = torch.matmul(q, keys.transpose(2, 3)) * sizes.size**-0.5
        scores = scores if not sizes.soft_cap else sizes.soft_cap * torch.tanh(scores / sizes.soft_cap)
        shares = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1, dtype=torch.float32)
        return flat(torch.matmul(shares.to(q.dtype), values))

    return run


def sdpa(tensors: Tensors, sizes: Sizes) -> Run:
    """Let torch's fused attention run over keys that lie together already."""
    from torch.nn.attention.bias import causal_lower_right

    q, k, v = together(tensors, sizes)
    options: dict[str, Any] = {"enable_gqa": sizes.heads != sizes.kv_heads}
    if sizes.queries == sizes.length:
        options["is_causal"] = True
    elif sizes.queries > 1:
        options["attn_mask"] = causal_lower_right(sizes.queries, sizes.length)
    return lambda: flat(scaled_dot_product_attention(q, k, v, **options))


def gathered(tensors: Tensors, sizes: Sizes) -> Run:
    """Copy keys and values out of their pages first, each time."""
    return lambda: sdpa(tensors, sizes)()


@cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(tensors: Tensors, sizes: Sizes) -> Run:
    """Let torch's flex attention be compiled for the mask and the cap."""
    from torch.nn.attention.flex_attention import create_block_mask

    q, k, v = together(tensors, sizes)
    first = sizes.length - sizes.queries

    def visible(_b: Any, _h: Any, query: Any, key: Any) -> Any:
        causal = key <= query + first
        return causal & (key > query + first - sizes.window) if sizes.window else causal

    def capped(score: Any, *_: Any) -> Any:
        return sizes.soft_cap * torch.tanh(score / sizes.soft_cap)

    @cache
    def options() -> dict[str, Any]:
        # Made when it is first run: some sizes are refused, and that is for the table to say.
        mask = create_block_mask(visible, None, None, sizes.queries, sizes.length, device=str(q.device))
        own = {"score_mod": capped} if sizes.soft_cap else {}
        return own | {"block_mask": mask, "enable_gqa": sizes.heads != sizes.kv_heads}

    return lambda: flat(_compiled()(q, k, v, **options()))


def bind_prefill(tensors: Tensors, sizes: Sizes, impl: Any) -> Run:
    """Prepare attention over pages."""
    rest = sizes.starts, sizes.lengths, tensors["tables"]

    def run() -> list[torch.Tensor]:
        out, _ = prefill_attention(tensors["q"], tensors["k"], tensors["v"], *rest, **sizes.options, impl=impl)
        return [out.flatten(1)]

    return run


def prefill_others(tensors: Tensors, sizes: Sizes) -> Mapping[str, Run]:
    """Return what has the mask that is wanted; scores of long sequences would not fit when written down."""
    found: dict[str, Run] = {}
    if sizes.sequences * sizes.heads * sizes.queries * sizes.length <= 2**31:
        found["eager"] = eager(tensors, sizes)
    if not sizes.window and not sizes.soft_cap:
        found["SDPA"] = sdpa(tensors, sizes)
        if sizes.queries < sizes.length:
            found["pages + SDPA"] = gathered(tensors, sizes)
    if tensors["q"].device.type == "cuda":
        found["flex"] = flex(tensors, sizes)
    return found


def prefill_work(sizes: Sizes, itemsize: int) -> Work:
    """Keys and values once, queries and outputs once; two products over the tokens that are seen."""
    pairs = int(seen(sizes, torch.device("cpu")).sum())
    numbers = 2 * sizes.sequences * (sizes.length * sizes.kv_heads + sizes.queries * sizes.heads) * sizes.size
    return Work(numbers * itemsize, 4 * sizes.sequences * pairs * sizes.heads * sizes.size)


def bind_training(tensors: Tensors, sizes: Sizes, impl: Any) -> Run:
    """Prepare the forward and backward pass over packed keys, as many as queries."""
    keys = (tensors[name].view(-1, sizes.kv_heads, sizes.size) for name in ("k", "v"))
    q, k, v = (t.detach().requires_grad_() for t in (tensors["q"], *keys))

    def run() -> list[torch.Tensor]:
        out, _ = packed_attention(q, k, v, sizes.starts, **sizes.options, impl=impl)
        return [g.flatten(1) for g in torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]

    return run


def training_others(tensors: Tensors, sizes: Sizes) -> Mapping[str, Run]:
    """Return torch's fused attention, forward and backward."""
    shape = (sizes.sequences, sizes.length, -1, sizes.size)
    q, k, v = (tensors[n].reshape(shape).transpose(1, 2).detach().requires_grad_() for n in ("q", "k", "v"))

    def run() -> list[torch.Tensor]:
        grouped = sizes.heads != sizes.kv_heads
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return [flat(g)[0] for g in torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]

    return {"SDPA": run}


def training_work(sizes: Sizes, itemsize: int) -> Work:
    """Seven products over the tokens that are seen, five of them backward, instead of two."""
    own = prefill_work(sizes, itemsize)
    return Work(3 * own.bytes, own.operations * 7 // 2)


SMALL = Sizes(3, 1, 77, 6, 2, 80)
_CHUNK = replace(SMALL, queries=21)
PREFILL = Op(
    "prefill_attention", inputs, bind_prefill, prefill_others, prefill_work,
    [_CHUNK, replace(_CHUNK, window=9, soft_cap=5.0, size=128), replace(_CHUNK, size=256, heads=4)],
)  # fmt: skip
TRAINING = Op(
    "packed_attention, both passes", inputs, bind_training, training_others, training_work,
    [replace(SMALL, queries=48, length=48)], False, whole=True,
)  # fmt: skip


def cases(shape: Shape, *, prompt: int = 4096) -> list[Case]:
    """Return what is measured of a model.

    Args:
        shape: the model.
        prompt: tokens of a prefill.
    """
    one = Sizes(1, prompt, prompt, shape.heads, shape.kv_heads, shape.size)
    chunk = replace(one, sequences=4, queries=max(1, prompt // 8))
    window = replace(one, window=max(1, prompt // 4), soft_cap=50.0)
    name = shape.name
    return [
        Case(PREFILL, f"{name}, {prompt} tokens", one, goal="80% of SDPA"),
        Case(PREFILL, f"{name}, 4 x {chunk.queries} after {prompt - chunk.queries} in pages", chunk, goal="over SDPA"),
        Case(PREFILL, f"{name}, {prompt} tokens, window, cap", window),
        Case(TRAINING, f"{name}, {prompt} tokens", replace(one, page=prompt)),
    ]
