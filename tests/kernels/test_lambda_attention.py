"""LM-Infinite: the first tokens and a window, no further away than the window is long, and no more to keep."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.attention import Case
from tests.kernels.harness import DEVICE, INTERPRETED, count_traffic
from toolkit.kernels.decode_attention import decode_attention
from toolkit.kernels.lambda_attention import lambda_attention
from toolkit.kernels.paging import visible
from toolkit.kernels.prefill_attention import prefill_attention

pytestmark = [pytest.mark.usefixtures("nan_outputs"), pytest.mark.system("lm_infinite")]
IMPLS = pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
G, D, N, WINDOW, SCALE = 2, 8, 3, 10, 0.4


def rotate(x, positions):
    """Rotary embedding of `[T, heads, D]`: pairs of features as complex numbers."""
    positions = torch.as_tensor(positions, dtype=torch.float64)[:, None]
    angles = positions * 100.0 ** -torch.arange(D // 2, dtype=torch.float64) / 1.0
    turned = torch.view_as_complex(x.double().reshape(*x.shape[:2], D // 2, 2)) * torch.polar(
        torch.ones_like(angles), angles
    ).unsqueeze(1)
    return torch.view_as_real(turned).flatten(2)


def capped_distances(q, k, v):
    """LM-Infinite by brute force: unrotated `[T, heads, D]`, and every key at its distance or the window's."""
    outs = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for i in range(len(q)):
        seen = [j for j in range(i + 1) if j < N or i - j < WINDOW]
        for head in range(q.shape[1]):
            near = [rotate(q[i : i + 1, head : head + 1], [min(i - j, WINDOW)])[0, 0] for j in seen]
            scores = torch.stack([SCALE * row @ k[j, head // group] for row, j in zip(near, seen, strict=True)])
            outs[i, head] = torch.softmax(scores, 0) @ v[seen, head // group]
    return outs


def drawn(length, heads=4):
    torch.manual_seed(0)
    return [torch.randn(length, h, D, dtype=torch.float64) for h in (heads, G, G)]


def paged(k, v, page=4):
    """Caches that hold the tokens backwards, and the block table."""
    count = -(-len(k) // page)
    caches = [torch.zeros(count * page, G, D, dtype=t.dtype).to(DEVICE) for t in (k, v)]
    for cache, t in zip(caches, (k, v), strict=True):
        cache[: len(t)] = t.to(DEVICE)
    return [c.view(count, page, G, D).flip(0).contiguous() for c in caches], torch.arange(
        count - 1, -1, -1, device=DEVICE
    )[None]


def attend(q, k, v, positions, queries, impl, kept=None):
    """The operation over tokens that lie at some positions, the last of which are queries."""
    q, k_near = q[-queries:], rotate(k, positions)
    dtype = torch.float64 if impl == "reference" else torch.float32
    (k_cache, v_cache), table = paged(k_near.to(dtype), v.to(dtype))
    near, far = rotate(q, positions[-queries:]), rotate(q, [WINDOW] * queries)
    return lambda_attention(
        near.to(DEVICE, dtype), far.to(DEVICE, dtype), k_cache, v_cache, k[None, :N].to(DEVICE, dtype), [0, queries],
        [len(k)], table, scale=SCALE, window=WINDOW, impl=impl,
    )[0].double().cpu()  # fmt: skip


TOLERANCE = {"reference": 1e-12, "torch": 2e-6, "triton": 2e-6}


@IMPLS
def test_distances_beyond_the_window_are_the_window(impl):
    q, k, v = drawn(29)
    got = attend(q, k, v, range(29), 29, impl)
    torch.testing.assert_close(got, capped_distances(q, k, v), rtol=0, atol=TOLERANCE[impl])


@IMPLS
def test_within_the_window_it_is_full_attention(impl):
    q, k, v = drawn(WINDOW)
    got = attend(q, k, v, range(WINDOW), WINDOW, impl)
    near = [rotate(t, range(WINDOW)) for t in (q, k)]
    k, v = near[1].repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = torch.einsum("qhd,khd->hqk", near[0], k) * SCALE
    scores = scores.masked_fill(torch.ones(WINDOW, WINDOW, dtype=torch.bool).triu(1), -torch.inf)
    full = torch.einsum("hqk,khd->qhd", torch.softmax(scores, -1), v)
    torch.testing.assert_close(got, full, rtol=0, atol=TOLERANCE[impl])


class Decoder:
    """Two layers of attention over embeddings, float64."""

    def __init__(self):
        torch.manual_seed(3)
        self.embedding = torch.randn(11, 16, dtype=torch.float64)
        self.layers = [
            [torch.randn(16, h * D, dtype=torch.float64) / 4 for h in (4, G, G)]
            + [torch.randn(4 * D, 16, dtype=torch.float64) / 6]
            for _ in range(2)
        ]

    def project(self, layer, x):
        return [(x @ w).view(len(x), -1, D) for w in self.layers[layer][:3]]

    def masked(self, tokens):
        """Logits of all positions at once, every key kept."""
        x = self.embedding[tokens]
        for layer in range(2):
            x = x + capped_distances(*self.project(layer, x)).flatten(1) @ self.layers[layer][3]
        return x @ self.embedding.T

    def evicting(self, tokens):
        """Logits token by token, keeping the first N and the last WINDOW keys and values of each layer."""
        kept = [[[], [], []] for _ in range(2)]
        logits = []
        for position, token in enumerate(tokens):
            x = self.embedding[token][None]
            for layer, (places, keys, values) in enumerate(kept):
                q, k, v = self.project(layer, x)
                for held, new in ((places, position), (keys, k), (values, v)):
                    held.append(new)
                    del held[N : max(N, len(held) - WINDOW)]
                assert len(places) <= N + WINDOW
                out = attend(q, torch.cat(keys), torch.cat(values), places, 1, "reference")
                x = x + out.flatten(1) @ self.layers[layer][3]
            logits.append(x[0] @ self.embedding.T)
        return torch.stack(logits)


def test_an_evicted_cache_has_the_logits_of_the_mask_on_the_full_cache():
    model, tokens = Decoder(), np.random.default_rng(0).integers(0, 11, 31)
    torch.testing.assert_close(model.evicting(tokens), model.masked(tokens), rtol=0, atol=1e-10)


@IMPLS
def test_an_evicted_cache_is_the_mask_on_the_full_cache_without_a_ceiling(impl):
    case = Case([40, 12, 7])
    whole = decode_attention(
        case.q, case.k_cache, case.v_cache, case.lengths, case.tables, scale=SCALE, window=9, num_global=N, impl=impl
    )
    for held in (case.k, case.v):
        held[:] = [torch.cat([t[:N], t[max(N, len(t) - 9) :]]) for t in held]
    case.lengths = [len(t) for t in case.k]
    case.place(4)
    assert case.lengths == [N + 9, N + 9, 7]
    kept = prefill_attention(
        case.q, case.k_cache, case.v_cache, case.starts, case.lengths, case.tables, scale=SCALE, window=9, num_global=N,
        impl=impl,
    )  # fmt: skip
    torch.testing.assert_close(kept, whole, rtol=2e-6, atol=1e-6)


@pytest.mark.skipif(not INTERPRETED, reason="loads are counted in the interpreter")
@pytest.mark.parametrize("length", [20, 100, 200])
def test_the_keys_that_are_read_do_not_grow(length):
    case = Case([length], heads=(2, 1), size=8)
    with count_traffic(case.k_cache) as (count,):
        decode_attention(
            case.q, case.k_cache, case.v_cache, [length], case.tables, scale=1.0, window=WINDOW, num_global=N,
            impl="triton",
        )  # fmt: skip
    assert count.loaded == (N + WINDOW) * 8 * 4


def test_every_row_of_the_mask_sees_as_many():
    seen = visible(0, 50, 50, WINDOW, torch.device("cpu"), N)
    assert seen.sum(1).tolist() == [min(i + 1, N + WINDOW) for i in range(50)]


def test_rotations_add_up():
    x = torch.randn(6, 2, D, dtype=torch.float64)
    torch.testing.assert_close(rotate(rotate(x, range(6)), [7] * 6), rotate(x, range(7, 13)), rtol=0, atol=1e-13)
