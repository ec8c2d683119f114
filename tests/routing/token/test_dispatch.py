"""Dispatch and combine against a loop over rows; capacities drop whom they should."""

from __future__ import annotations

import math

import pytest
import torch

from toolkit.routing.token.dispatch import balance_loss, dispatch, encode, mix

pytestmark = pytest.mark.system("tutel")
ROWS, EXPERTS, K = 37, 5, 2


def drawn(seed: int = 0, rows: int = ROWS):
    """Return whole inputs, choices, weights in eighths and whole experts, whose sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (rows, 6), generator=generator).double()
    index = torch.rand(rows, EXPERTS, generator=generator).argsort(1)[:, :K]
    index[: rows // 2, 0], index[: rows // 2, 1] = 1, 3  # a crowd
    weight = torch.randint(1, 9, (rows, K), generator=generator) / 8
    matrices = torch.randint(-3, 4, (EXPERTS, 6, 4), generator=generator).double()
    return x, index, weight, matrices


def dense(x, index, weight, matrices, dropped=()):
    out = torch.zeros(len(x), 4, dtype=torch.float64)
    for row in range(len(x)):
        for choice in range(K):
            if (row, choice) not in dropped:
                out[row] += float(weight[row, choice]) * (x[row] @ matrices[index[row, choice]])
    return out


def experts_of(matrices):
    return [lambda rows, m=m: rows @ m for m in matrices]


def needs(index):
    return index.flatten().bincount(minlength=EXPERTS)


@pytest.mark.parametrize("rows", [1, 4, ROWS])
def test_dropless_is_the_dense_sum_to_the_bit(rows):
    x, index, weight, matrices = drawn(rows=rows)
    plan = dispatch(index, EXPERTS)
    assert plan.num_dropped == 0
    assert plan.capacity == int(needs(index).max())
    assert torch.equal(mix(x, weight.double(), plan, experts_of(matrices)), dense(x, index, weight, matrices))


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 3.0, -0.5, -1.0, -9.0])
def test_capacity(factor):
    _, index, _, _ = drawn()
    plan, share = dispatch(index, EXPERTS, factor), K * int(abs(factor) * math.ceil(ROWS / EXPERTS))
    assert plan.capacity == (share if factor > 0 else min(share, int(needs(index).max())))
    assert plan.num_dropped == int((needs(index) - plan.capacity).clamp_min(0).sum())
    for expert in range(EXPERTS):
        places = plan.place[plan.index == expert].sort().values
        assert places.tolist() == list(range(len(places))), "two choices have one place"


@pytest.mark.parametrize("factor", [0.5, 1.0])
@pytest.mark.parametrize("by_priority", [False, True])
def test_dropped_are_the_last_in_order_second_choices_after_first_ones(factor, by_priority):
    x, index, weight, matrices = drawn(1)
    priority = torch.rand(ROWS, generator=torch.Generator().manual_seed(9)) if by_priority else None
    plan = dispatch(index, EXPERTS, factor, priority)
    order = sorted(range(ROWS), key=lambda row: -float(priority[row])) if priority is not None else range(ROWS)
    room, dropped = [plan.capacity] * EXPERTS, set()
    for choice in range(K):
        for row in order:
            expert = int(index[row, choice])
            if room[expert] == 0:
                dropped.add((row, choice))
            room[expert] = max(0, room[expert] - 1)
    assert {tuple(at) for at in (~plan.kept).nonzero().tolist()} == dropped
    assert dropped
    got = mix(x, weight.double(), plan, experts_of(matrices))
    assert torch.equal(got, dense(x, index, weight, matrices, dropped))


def test_permuting_rows_permutes_outputs_when_nothing_is_dropped():
    x, index, weight, matrices = drawn(2)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    plain = mix(x, weight.double(), dispatch(index, EXPERTS), experts_of(matrices))
    permuted = mix(x[order], weight[order].double(), dispatch(index[order], EXPERTS), experts_of(matrices))
    assert torch.equal(permuted, plain[order])


def test_one_expert_and_equal_experts_are_the_plain_layer():
    x, index, _, matrices = drawn(3)
    one = torch.zeros(ROWS, 1, dtype=torch.int64)
    assert torch.equal(mix(x, torch.ones(ROWS, 1), dispatch(one, 1), experts_of(matrices[:1])), x @ matrices[0])
    equal, shares = matrices[:1].expand(EXPERTS, -1, -1), torch.full((ROWS, K), 0.5)
    assert torch.equal(mix(x, shares, dispatch(index, EXPERTS), experts_of(equal)), x @ matrices[0])


def test_empty_places_are_zero_and_gradients_flow():
    x, index, weight, matrices = drawn(4)
    x.requires_grad_(True)
    scale = weight.double().requires_grad_(True)
    plan = dispatch(index, EXPERTS, 0.5)
    assert not encode(x, dispatch(index[:2], EXPERTS))[0].any()
    mix(x, scale, plan, experts_of(matrices)).sum().backward()
    assert scale.grad is not None
    assert not scale.grad[~plan.kept].any()
    sums = (x.detach()[:, None] * matrices[index].sum(-1)).sum(-1)
    torch.testing.assert_close(scale.grad[plan.kept], sums[plan.kept])


def test_balance_is_one_where_experts_are_used_evenly_and_more_else():
    even = torch.eye(4).repeat(3, 1) * 8
    assert float(balance_loss(even, even.argmax(1, keepdim=True))) == pytest.approx(1, abs=1e-6)
    lopsided = torch.tensor([[8.0, 0, 0, 0]]).repeat(12, 1)
    assert float(balance_loss(lopsided, lopsided.argmax(1, keepdim=True))) > 3.9
