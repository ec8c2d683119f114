"""Run cases: what is wrong is named and not timed; tables and JSON of the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch

from benchmarks.gpu.case import Case, Ceilings, Op, Run, agree, zeroed
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.shapes import Shape, Step


@dataclass(frozen=True)
class Row:
    """What was measured of a case, in seconds.

    Attributes:
        op: name.
        case: name.
        floor: the least that it takes.
        ours: `None` where it was not timed.
        others: by name; a text says why there is none.
        wrong: what is wrong with the operation, "" if nothing.
        goal: as the case says.
    """

    op: str
    case: str
    floor: float
    ours: float | None = None
    others: Mapping[str, float | str] = field(default_factory=dict)
    wrong: str = ""
    goal: str = ""

    @property
    def share(self) -> float | None:
        """Of the floor in what it took."""
        return None if self.ours is None else self.floor / self.ours


class Bench:
    """Runs cases on one device.

    Args:
        device: of all tensors.
        dtype: of the model.
        clock: that measures.
        limits: what the device can do.
        until: time of `now` after which nothing more is begun.
        now: seconds on a clock.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        clock: Clock,
        limits: Ceilings,
        *,
        until: float = float("inf"),
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.device, self.dtype, self.clock, self.limits = device, dtype, clock, limits
        self.until, self.now = until, now
        self._wrong: dict[int, str] = {}

    def run(self, case: Case) -> Row:
        """Check, then measure."""
        floor = case.op.work(case.sizes, self.dtype.itemsize).seconds(self.limits)
        row = Row(case.op.name, case.name, floor, goal=case.goal)
        if self.now() > self.until:
            return Row(**{**asdict(row), "wrong": "not run: out of time"})
        wrong = self._check(case.op)
        if wrong:
            return Row(**{**asdict(row), "wrong": wrong})
        try:
            ours, others, wrong = self._measure(case)
        except Exception as error:  # whatever goes wrong with one case must not take the others with it
            ours, others, wrong = None, {}, _first_line(error)
        return Row(row.op, row.case, floor, ours, others, wrong, row.goal)

    def _check(self, op: Op) -> str:
        """Compare an operation with float64, once."""
        if id(op) not in self._wrong:
            try:
                op.check(self.device, self.dtype)
                self._wrong[id(op)] = ""
            except Exception as error:
                self._wrong[id(op)] = _first_line(error)
        return self._wrong[id(op)]

    def _measure(self, case: Case) -> tuple[float | None, dict[str, float | str], str]:
        torch.manual_seed(0)
        tensors = case.op.inputs(case.sizes, self.device, self.dtype)
        ours = case.op.bind(tensors, case.sizes, "triton")
        others = case.op.others(tensors, case.sizes)
        known = next((name for name in ("eager", "SDPA") if name in others), None)
        if known:
            agree(zeroed(ours), zeroed(others[known]), whole=case.op.whole)
        found = {name: self._other(run, case) for name, run in others.items()}
        return self.clock.seconds(ours, graph=case.op.graph, cold=case.cold), found, ""

    def _other(self, run: Run, case: Case) -> float | str:
        """Measure another form, without a graph if it cannot be captured; say why if torch refuses it."""
        said = ""
        for graph in sorted({case.op.graph, False}, reverse=True):
            try:
                return self.clock.seconds(run, graph=graph, cold=case.cold)
            except Exception as error:
                said = _first_line(error)
        return said


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:160]


def table(rows: Sequence[Row]) -> str:
    """Return the rows of one operation as a Markdown table, in microseconds."""
    names = list(dict.fromkeys(name for row in rows for name in row.others))
    head = [rows[0].op, "us", "floor us", "of floor", *(f"{name} us" for name in names), "aim"]
    lines = [head, ["---", *["--:"] * (len(head) - 2), "---"]]
    for row in rows:
        if row.ours is None or row.share is None:
            lines.append([row.case, "", _micros(row.floor), "", *[""] * len(names), f"RED: {row.wrong}"])
            continue
        cells = [row.case, _micros(row.ours), _micros(row.floor), f"{row.share:.0%}"]
        lines.append([*cells, *(_micros(row.others.get(name, "")) for name in names), row.goal])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _micros(value: float | str) -> str:
    return (value and "no") if isinstance(value, str) else f"{value * 1e6:.1f}"


def step_text(shape: Shape, rows: Sequence[Row], limits: Ceilings, *, batch: int, context: int, goal: float) -> str:
    """Return what the adapters of a decode step take, beside the rest of the step's floor.

    Args:
        shape: the model.
        rows: of `lora.step_cases`.
        limits: of the device.
        batch: sequences, each with an adapter of rank 16.
        context: tokens of each.
        goal: seconds that are aimed at.
    """
    step = Step.of(shape, limits.bandwidth, sequences=batch, context=context, rank=16)
    floors = f"weights {step.weights * 1e3:.2f} + KV {step.kv * 1e3:.2f} + adapters {step.adapters * 1e3:.2f}"
    text = f"decode step of {shape.name}, {batch} sequences at {context}: at least {step.total * 1e3:.2f} ms ({floors})"
    times = [row.ours for row in rows if row.ours is not None]
    if not rows or len(times) < len(rows):
        return f"{text}; the adapters were not measured"
    share = step.adapters / sum(times)
    return f"{text}; the adapters took {sum(times) * 1e3:.2f} ms ({share:.0%} of bandwidth), aim {goal * 1e3:.1f} ms"
