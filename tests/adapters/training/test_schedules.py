"""Learning rates are their formulas, in a course and in a run."""

from __future__ import annotations

import json
from math import cos, log, pi

import numpy as np
import pytest

from toolkit.adapters.train import train
from toolkit.adapters.training._base import Course
from toolkit.adapters.training.power import Power
from toolkit.adapters.training.refined import refined
from toolkit.adapters.training.restarts import Restarts
from toolkit.data.rows import write_rows
from toolkit.errors import SpecError


def course(steps: int = 100, rows: float = 8, tokens: float = 1000) -> Course:
    return Course(steps, rows, tokens, 1e-3)


def power(**parameters) -> Power:
    return Power(Power.Params(**parameters), None)  # pyright: ignore[reportArgumentType]


@pytest.mark.system("power_scheduler")
def test_power_knows_neither_the_total_nor_the_batch():
    short, long = (power().rate(course(steps)) for steps in (100, 10_000))
    assert [short(n) for n in range(100)] == [long(n) for n in range(100)], (
        "a longer run goes on as a shorter one began"
    )
    far = power(b=-0.7).rate(course(tokens=10_000))
    slope = (log(far(9000)) - log(far(900))) / (log(9000) - log(900))
    assert slope == pytest.approx(-0.7, rel=1e-9)
    once, twice = power().rate(course(rows=8)), power().rate(course(rows=16))
    assert twice(5000) == pytest.approx(2 * once(5000), rel=1e-12)
    assert power(a=100).rate(course())(1) == 1.0, "never above the spec's own rate"
    assert power(a=0.5).rate(course())(200) == pytest.approx(8 * 0.5 * 200_000**-0.51, rel=1e-12)


@pytest.mark.system("power_scheduler")
def test_power_warms_up_and_decays_on_request():
    rate = power(a=100, warmup_steps=10, decay=0.2).rate(course(100))
    assert [rate(n) for n in (0, 5, 10, 80, 90, 100)] == pytest.approx([0, 0.5, 1, 1, 0.5, 0])


@pytest.mark.system("lr_refinement")
def test_equal_norms_give_the_line_to_zero():
    rates = refined(np.full(7, 3.0), 50, 1.0, 0.1)
    np.testing.assert_allclose(rates, (49 - np.arange(50)) / 49, atol=1e-12)


@pytest.mark.system("lr_refinement")
@pytest.mark.parametrize("power_", [1.0, 2.0])
def test_falling_norms_warm_up_and_anneal_late(power_):
    norms = np.linspace(4, 1, 40)
    rates = refined(norms, 40, power_, 0.0)
    weights = norms**-power_
    wanted = np.array([weights[t] * sum(weights[t + 1 :]) for t in range(40)])
    np.testing.assert_allclose(rates, wanted / wanted.max(), rtol=1e-10)
    assert rates[-1] == 0
    assert (rates >= 0).all()
    assert rates[0] < rates[10], "it rises first"
    assert rates[30] > (39 - 30) / 39, "later steps are larger than on the line"
    noisy = norms.copy()
    noisy[20] = 1000
    assert np.abs(refined(noisy, 40, power_, 0.2) - refined(norms, 40, power_, 0.2)).max() < 0.05


def test_restarts_are_warm_ups_and_cosines():
    rate = Restarts(Restarts.Params(cycles=2, warmup=0.2, peak=0.5, floor=0.1), None).rate(course(100))  # pyright: ignore[reportArgumentType]
    assert [rate(n) for n in (0, 5, 10)] == pytest.approx([0, 0.5, 1])
    assert rate(30) == pytest.approx(0.1 + 0.9 * (1 + cos(pi / 2)) / 2)
    assert rate(49) == pytest.approx(0.1 + 0.9 * (1 + cos(pi * 39 / 40)) / 2)
    assert [rate(n) for n in (50, 60, 100)] == pytest.approx([0, 0.5, 0.05])


def logged(folder) -> list[dict]:
    return [e for e in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "learning_rate" in e]


def test_a_run_follows_its_schedule_and_refines_the_one_before(base, tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": "x" * (3 + i % 7)} for i in range(24)])

    def spec(methods, **training) -> dict:
        settings = {"max_steps": 8, "batch_size": 4, "learning_rate": 0.01, "logging_steps": 1} | training
        training = settings | {"methods": methods}
        return {"base": str(base), "data": {"train": str(tmp_path / "a.jsonl")}, "training": training, "device": "cpu"}

    first = train(spec({"method": "restarts", "cycles": 2}), tmp_path / "first", quiet=True).path
    rate = Restarts(Restarts.Params(cycles=2), None).rate(course(8))  # pyright: ignore[reportArgumentType]
    assert [e["learning_rate"] for e in logged(first)] == pytest.approx([0.01 * rate(n) for n in range(8)])
    method = {"method": "refined", "metrics": str(first / "metrics.jsonl")}
    second = train(spec(method, max_steps=6), tmp_path / "second", quiet=True).path
    norms = np.array([e["grad_norm"] for e in logged(first)])
    assert [e["learning_rate"] for e in logged(second)] == pytest.approx(0.01 * refined(norms, 6, 1.0, 0.1))
    with pytest.raises(SpecError, match=r"methods\[0\]\.metrics: .*a\.jsonl: no metrics of a run with at least two"):
        train(spec({"method": "refined", "metrics": str(tmp_path / "a.jsonl")}), tmp_path / "third", quiet=True)
