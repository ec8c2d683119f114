"""The free numbers of a merge: where they are in its spec, their bounds, and the spec for other values of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import exp, log
from typing import Any

from toolkit.errors import Problem
from toolkit.jobs.search.spec import WEIGHTS, FreeSpec, OptionsSpec
from toolkit.names import did_you_mean
from toolkit.specs import path_text

Values = tuple[float, ...]
"""One value for each free number."""

DIGITS = 4
"""Significant digits of a candidate's values, so that the spec that is found reads well and gives what was measured."""


@dataclass(frozen=True)
class Free:
    """One free number.

    Attributes:
        trail: keys and indices that lead to it.
        start: its value in the merge as given.
        bounds: of its values, and the rest of what the spec says.
    """

    trail: tuple[str | int, ...]
    start: float
    bounds: FreeSpec

    @property
    def path(self) -> str:
        """Its key path."""
        return path_text(self.trail)

    def value(self, position: float) -> float:
        """Return the value at a position between the bounds, from 0 to 1."""
        low, high = self.bounds.low, self.bounds.high
        exact = low * exp(position * log(high / low)) if self.bounds.log else low + position * (high - low)
        return min(max(float(f"{exact:.{DIGITS}g}"), low), high)

    def position(self, value: float) -> float:
        """Return where a value lies between the bounds, from 0 to 1."""
        low, high = self.bounds.low, self.bounds.high
        if self.bounds.log:
            return log(value / low) / log(high / low)
        return (value - low) / (high - low)


@dataclass(frozen=True)
class Space:
    """All free numbers of a merge.

    Attributes:
        merge: its spec as plain data.
        free: its free numbers, in the order of the search spec.
    """

    merge: Mapping[str, Any]
    free: tuple[Free, ...]

    @property
    def start(self) -> Values:
        """The values of the merge as it was given."""
        return tuple(free.start for free in self.free)

    def values(self, positions: Sequence[float]) -> Values:
        """Return the values at positions between the bounds, each from 0 to 1."""
        return tuple(free.value(p) for free, p in zip(self.free, positions, strict=True))

    def named(self, values: Values) -> dict[str, float]:
        """Return values by key path."""
        return {free.path: value for free, value in zip(self.free, values, strict=True)}

    def spec(self, values: Values) -> dict[str, Any]:
        """Return the merge's spec with other values of its free numbers."""
        data = deepcopy(dict(self.merge))
        for free, value in zip(self.free, values, strict=True):
            here: Any = data
            for part in free.trail[:-1]:
                here = here[part]
            here[free.trail[-1]] = value
        return data


def make_space(merge: Mapping[str, Any], options: OptionsSpec) -> tuple[Space, list[Problem]]:
    """Find the free numbers of a merge, and what is wrong with the search's idea of them."""
    known = {path_text(trail): (trail, value) for trail, value in _numbers(merge)}
    free: dict[str, Free] = {}
    problems: list[Problem] = []
    for i, bounds in enumerate(options.parameters or [FreeSpec(path=WEIGHTS)]):
        where = f"search.parameters[{i}]" if options.parameters else "search.parameters"
        inside = re.compile(re.escape(bounds.path).replace(r"\[\*\]", r"\[\d+\]") + r"([.\[].*)?")
        found = [path for path in known if inside.fullmatch(path)]
        if not found:
            problems.append(Problem(where, _nothing(bounds.path, known, bool(options.parameters))))
        for path in found:
            trail, start = known[path]
            if path in free:
                problems.append(Problem(where, f"{path} is free already"))
            if not bounds.low <= start <= bounds.high:
                span = f"{bounds.low:g} to {bounds.high:g}"
                problems.append(Problem(where, f"{path} is {start:g} in the merge, which is not within {span}"))
            free[path] = Free(trail, start, bounds)
    return Space(merge, tuple(free.values())), problems


def _nothing(path: str, known: Mapping[str, Any], asked: bool) -> str:
    if not asked:
        return "required: the models have no weights of their own in the merge that could be tuned"
    return f"no number of the merge's parameters is at {path!r}{did_you_mean(path, known)}" + (
        f" (numbers: {', '.join(known)})" if known else " (it has none; give the values to start from)"
    )


def _numbers(
    value: Any, trail: tuple[str | int, ...] = (), inside: bool = False
) -> Iterator[tuple[tuple[str | int, ...], float]]:
    """Yield every number in a block of parameters, and where it is."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, (*trail, key), inside or key == "parameters")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _numbers(inner, (*trail, index), inside)
    elif inside and isinstance(value, int | float) and not isinstance(value, bool):
        yield trail, value
