"""Mixtures: every row has the same adapters, with weights of its own at every linear."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.harness import DEVICE, DOT_DTYPES
from tests.kernels.test_paged_lora import RANKS, Case
from toolkit.kernels.grouped_lora import Routes, paged_lora, paged_lora_backward, stacks

pytestmark = pytest.mark.usefixtures("nan_outputs")
SLOTS = (4, 0, 6, 2, 1)
"""Adapter 6 has no pair at all here, and 2 none at one linear."""


class Mixture(Case):
    """Rows that mix adapters; a third of the weights is 0."""

    def __init__(self, rows: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__([-1] * rows, dtype)
        rng = np.random.default_rng(rows)
        drawn = rng.choice([-0.5, 0, 0, 0.25, 0.75, 1], (len(self.widths), rows, len(SLOTS)))
        self.mixture = torch.tensor(drawn, dtype=torch.float32, device=DEVICE)
        self.routes = Routes.to_all(SLOTS, rows).mixed(self.mixture)

    def _by_row(self, double: bool):
        ys = [y.double() if double else y for y in self.base()]
        kind = torch.float64 if double else self.dtype
        for linear, y in enumerate(ys):
            for row in range(len(self.x)):
                for choice, slot in enumerate(SLOTS):
                    pair = self.adapters[slot][linear] if slot < len(RANKS) else None
                    if pair is not None:
                        weight = float(self.mixture[linear, row, choice])
                        change = pair.b_Nr.to(kind) @ (pair.a_rK.to(kind) @ self.x[row].to(kind))
                        y[row] += weight * pair.scale * change
        return ys

    def exact(self):
        return self._by_row(double=True)

    def eager(self):
        return self._by_row(double=False)


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_against_float64(impl, dtype):
    case = Mixture(13, dtype)
    case.check(case.run(impl))


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("rows", [1, 40])
def test_any_number_of_rows(impl, rows):
    case = Mixture(rows)
    case.check(case.run(impl))


@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_many_adapters_one_after_another(dtype, monkeypatch):
    monkeypatch.setattr(stacks, "MOST_TOGETHER", 0)
    case = Mixture(13, dtype)
    case.check(case.run("torch"))


def test_stacks_of_mixtures_follow_adapters_that_come_and_go():
    case = Mixture(5)
    case.check(case.run("torch"))
    pages = sorted(range(len(case.pairs.pool)))
    case.pairs.clear(4)
    taken = {o // (case.pairs.page // 16) for offsets in case.pairs._lists.values() for o in offsets // 16}
    free = [page for page in pages if page not in taken]
    case.adapters[4] = [case.pair(9, rank, width) for rank, width in zip(RANKS[1], case.widths, strict=True)]
    case.pairs.place(4, case.adapters[4], free[: case.pairs.pages_for(case.adapters[4])])
    case.check(case.run("torch"))
    assert len(case.pairs.stacks._mixtures) == 1


def test_what_does_not_fit_raises():
    case = Mixture(3)
    wrong = case.routes.mixed(case.mixture[:, :, :2])
    with pytest.raises(ValueError, match="a mixture of shape"):
        paged_lora(case.base(), case.x, wrong, case.pairs, case.biases)
    dora = Case([-1] * 3, bias=(0,))
    with pytest.raises(ValueError, match="only LoRAs without biases"):
        paged_lora(dora.base(), dora.x, case.routes, dora.pairs, dora.biases)
    with pytest.raises(ValueError, match="no gradients"):
        paged_lora_backward(case.base(), case.x, case.routes, case.pairs)


@pytest.mark.parametrize("fault", ["scale", "wrong linear", "wrong row"])
def test_planted_faults_are_caught(fault):
    case = Mixture(13)
    changed = {
        "scale": case.mixture * 1.02,
        "wrong linear": case.mixture.flip(0),
        "wrong row": case.mixture.roll(1, 1),
    }[fault]
    case.routes = case.routes.mixed(changed)
    with pytest.raises(AssertionError):
        case.check(case.run("torch"))
