"""Work lists that keep their place: one captured run serves every batch that has room in it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels import attention, test_paged_lora
from tests.kernels.harness import DEVICE, INTERPRETED
from tests.kernels.replay import Replay
from toolkit.kernels.decode_attention import SharedPrefix, decode_attention
from toolkit.kernels.decode_attention.plan import FixedLengths
from toolkit.kernels.fixed import FixedLists, Room
from toolkit.kernels.grouped_lora import Routes, paged_lora
from toolkit.kernels.grouped_lora.fixed import FixedRoutes

pytestmark = [
    pytest.mark.usefixtures("nan_outputs"),
    pytest.mark.skipif(not INTERPRETED, reason="repeats launches on a CPU"),
]


def test_lists_are_followed_by_rows_without_work():
    lists = {"bounds": np.array([0, 2, 5]), "items": np.array([[1, 2]]), "none": np.zeros((0, 2))}
    rooms = {"bounds": Room(5), "items": Room(3, 2, (-1, 7)), "none": Room(1, 2)}
    fixed = FixedLists(rooms, lambda: lists, DEVICE)
    places = {name: t.data_ptr() for name, t in fixed.tensors.items()}
    assert fixed.tensors["bounds"].flatten().tolist() == [0, 2, 5, 5, 5]
    assert fixed.tensors["items"].tolist() == [[1, 2], [-1, 7], [-1, 7]]
    assert fixed.tensors["none"].tolist() == [[0, 0]]
    lists["items"] = np.array([[3, 4], [5, 6]])
    fixed.refresh()
    assert fixed.tensors["items"].tolist() == [[3, 4], [5, 6], [-1, 7]]
    assert places == {name: t.data_ptr() for name, t in fixed.tensors.items()}
    lists["bounds"] = np.arange(6)
    with pytest.raises(ValueError, match="bounds: 6 rows where 5 have room"):
        fixed.refresh()


@pytest.mark.system("lean_attention")
@pytest.mark.parametrize("options", [{}, {"window": 7}, {"window": 30, "num_global": 5}], ids=["all", "window", "both"])
def test_attention_of_other_lengths(options):
    lengths = FixedLengths([0, 0, 0, 1])
    first = attention.Case([40, 9, 137, 1])
    q, k, v = torch.zeros_like(first.q), first.k_cache.clone(), first.v_cache.clone()
    tables = torch.zeros_like(first.tables)
    captured = Replay(
        lambda: torch.cat(
            [t.flatten(1) for t in decode_attention(q, k, v, lengths, tables, scale=0.3, impl="triton", **options)], 1
        )
    )
    for case in (first, attention.Case([137, 0, 5, 6]), attention.Case([1, 0, 0, 0]), attention.Case([0] * 4)):
        width = case.tables.shape[1]
        q.copy_(case.q)
        k[: len(case.k_cache)], v[: len(case.v_cache)] = case.k_cache, case.v_cache
        tables[:, :width] = case.tables
        lengths.change(case.lengths)
        out, lse = captured.replay().split([case.q[0].numel(), case.h], dim=1)
        exact = case.exact(0.3, **options)
        attention.check((out.view_as(case.q), lse), exact, (out.view_as(case.q), lse))
    with pytest.raises(ValueError, match="3 lengths in place of 4"):
        lengths.change([1, 2, 3])
    lengths.change([2, 2, 2, 2])
    with pytest.raises(ValueError, match="no shared prefixes"):
        decode_attention(q, k, v, lengths, tables, scale=1.0, impl="triton", prefixes=[SharedPrefix((0, 1), 1)])


def captured_lora(case):
    """A run over fixed tensors, and what fills and repeats it for other routes; `None` where there is no room."""
    routes = FixedRoutes(case.routes.slots, case.routes.weights)
    x, ys = torch.zeros_like(case.x), [torch.zeros_like(y) for y in case.base()]

    def run():
        paged_lora(ys, x, routes, case.pairs, case.biases, impl="triton")
        return x

    captured = Replay(run)

    def again(other):
        case.routes = other
        if not routes.change(other):
            return None
        case.pairs.upload()
        x.copy_(case.x)
        for y, base in zip(ys, case.base(), strict=True):
            y.copy_(base)
        captured.replay()
        return ys

    return again


def test_lora_of_other_rows():
    case = test_paged_lora.Case(test_paged_lora.ROWS)
    run = captured_lora(case)
    rows = len(test_paged_lora.ROWS)
    for slots in (test_paged_lora.ROWS, [4] * rows, [-1] * rows, [*range(7), *range(7), -1], [6] * rows):
        case.check(run(Routes.of(slots, 0.5)))
    assert run(Routes.of([0] * (rows + 1))) is None
    assert run(Routes.of([[0, 1]] * rows)) is None


def test_lora_of_other_compositions():
    case = test_paged_lora.Case(test_paged_lora.COMPOSED, weights=test_paged_lora.COMPOSED_WEIGHTS)
    run = captured_lora(case)
    case.check(run(case.routes))
    for slots in ([[0, -1]] * 11, [[-1, -1]] * 11, [[0, 1], [1, 0], *[[2, 4], [5, 3], [-1, 4]] * 3]):
        case.check(run(Routes.of(slots, 0.25)))


def test_dora_of_other_rows():
    case = test_paged_lora.Case(test_paged_lora.ROWS, dora=(0, 2, 5), bias=(1, 2, 3, 4, 5))
    run = captured_lora(case)
    for slots in (test_paged_lora.ROWS, [5] * 15, [-1] * 15, [1, 2, 3] * 5):
        case.check(run(Routes.of(slots)))


def test_lora_without_room():
    """An adapter of a larger rank does not fit, nor does one of which linears that were alike no longer are."""
    case = test_paged_lora.Case([0, 3, 5], ranks=test_paged_lora.RANKS)
    run = captured_lora(case)
    assert run(Routes.of([4, 3, 5])) is None
    case.check(run(Routes.of([5, 3, 0])))
    other = test_paged_lora.Case([1], ranks=[(4, 4, 4), (4, 4, 4), (8, 8, 8)])
    routes, blocks = (
        FixedRoutes(other.routes.slots, other.routes.weights),
        test_paged_lora.triton_form.Blocks(16, 16, 16),
    )
    tables = np.array([4, 4, 8]), np.array([6, 4, 8])
    plans = [routes.plan(table, blocks, DEVICE) for table in tables]
    assert plans[0] is plans[1]
    assert routes.change(Routes.of([2]))
    assert not routes.change(Routes.of([0]))


def test_an_adapter_that_comes_later():
    case = test_paged_lora.Case([0, 1, 2, -1])
    place = case.pairs
    pages = (
        torch.cat([t.reshape(-1) for n in range(3) for t in place.elements(3, n)]) // test_paged_lora.PAGE
    ).unique()
    place.clear(3)
    run = captured_lora(case)
    edition = place.tables_edition
    place.place(3, case.adapters[3], pages.tolist())
    case.check(run(Routes.of([3, 3, 0, 1])))
    assert place.tables_edition == edition
