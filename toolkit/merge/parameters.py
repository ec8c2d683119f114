"""Turn the parameter values of a spec into numbers for one tensor.

A value is a scalar; a list of numbers, anchors that are spread evenly over the layers and interpolated; or a list
of `{filter, value}`, of which the first that matches the tensor's name holds. A filter is a part of a name, a
glob when it contains `*`, `?` or `[`, or a regular expression after `re:`; without a filter it matches all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from toolkit import specs
from toolkit.errors import Problem
from toolkit.merge.groups import Block, Group, Slot
from toolkit.merge.method import Method, MethodParams
from toolkit.names import did_you_mean

Scalar = float | int | bool | str


def evaluate(value: Any, name: str, depth: float) -> Scalar | None:
    """Return the value for a tensor at `depth` (0 to 1), or `None` when no filter matches."""
    if not isinstance(value, Mapping | list):
        return value
    if isinstance(value, Mapping):
        value = [value]
    if all(_is_number(anchor) for anchor in value):
        position = depth * (len(value) - 1)
        low = min(int(position), len(value) - 1)
        high = min(low + 1, len(value) - 1)
        share = position - low
        return (1 - share) * value[low] + share * value[high]
    for case in value:
        if matches(case.get("filter"), name):
            return evaluate(case["value"], name, depth)
    return None


def matches(pattern: str | None, name: str) -> bool:
    """Tell whether a filter matches a tensor's name."""
    if not pattern or pattern == "*":
        return True
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    if any(c in pattern for c in "*?["):
        return fnmatchcase(name, pattern)
    return pattern in name


IGNORED = ("int8_mask",)
"""Parameters of mergekit's that change how it computes and not what; accepted, and without effect here."""


def check(groups: Sequence[Group], method: Method) -> list[Problem]:
    """Find parameters that the method does not know, or whose values have a wrong form."""
    found: dict[Problem, None] = {}
    for group in groups:
        blocks = [(block, method.per_model | method.shared) for block in group.shared]
        blocks += [(slot.block, method.per_model) for slot in group.slots]
        for (where, values), known in blocks:
            for key, value in values.items():
                found |= dict.fromkeys(_check_one(f"{where}.{key}", key, value, known, method))
    return list(found)


def _check_one(place: str, key: str, value: Any, known: frozenset[str], method: Method) -> list[Problem]:
    if key in known:
        return [Problem(place, message) for message in _faults(value)]
    if key in IGNORED:
        return []
    if key in method.shared:
        return [Problem(place, f"{key!r} is one value for all models; move it to parameters")]
    hint = did_you_mean(key, known) or f" (known: {', '.join(sorted(known)) or 'none'})"
    return [Problem(place, f"{method.name} has no parameter {key!r}{hint}")]


class Resolver:
    """Parameters of every tensor that a group makes.

    Args:
        method: of the merge.
        group: whose blocks were checked by `check`.
        slots: of the group, those that take part.
    """

    def __init__(self, method: Method, group: Group, slots: Sequence[Slot]) -> None:
        self.method, self.group, self.slots = method, group, list(slots)
        self._seen: dict[tuple[Any, ...], MethodParams | list[Problem]] = {}

    def resolve(self, name: str, depth: float) -> MethodParams | list[Problem]:
        """Return the parameters of a tensor at `depth` (0 to 1), or what is wrong with them."""
        values = {key: self._value(key, name, depth) for key in self._keys()}
        identity = tuple(values.items())
        if identity not in self._seen:
            self._seen[identity] = self._validated(values, name)
        return self._seen[identity]

    def _keys(self) -> Iterator[str]:
        for name, field in self.method.params.model_fields.items():
            yield field.alias or name

    def _value(self, key: str, name: str, depth: float) -> Any:
        shared = self._first(self.group.shared, key, name, depth)
        if key in self.method.shared:
            return shared
        own = [self._first([slot.block], key, name, depth) for slot in self.slots]
        return tuple(shared if value is None else value for value in own)

    @staticmethod
    def _first(blocks: Sequence[Block], key: str, name: str, depth: float) -> Scalar | None:
        values = (evaluate(values.get(key), name, depth) for _, values in blocks)
        return next((value for value in values if value is not None), None)

    def _validated(self, values: Mapping[str, Any], name: str) -> MethodParams | list[Problem]:
        given: dict[str, Any] = {}
        found: list[Problem] = []
        for field_name, field in self.method.params.model_fields.items():
            key = field.alias or field_name
            value = values[key]
            default = None if field.default is PydanticUndefined else field.default
            if isinstance(value, tuple):
                rest = [default[0] if default else None] * len(value)
                value = tuple(r if v is None else v for v, r in zip(value, rest, strict=True))
                missing = [slot for slot, v in zip(self.slots, value, strict=True) if v is None]
                found += [Problem(f"{slot.path}.parameters.{key}", self._missing(key, name)) for slot in missing]
            elif value is None and field.is_required():
                found.append(Problem(f"parameters.{key}", self._missing(key, name)))
            if value is not None:
                given[key] = value
        if found:
            return found
        try:
            return self.method.params.model_validate(given)
        except ValidationError as error:
            found = specs.problems(error, given, self.method.params, {})
            return [Problem(self._place(p.where), p.message) for p in found]

    def _missing(self, key: str, name: str) -> str:
        here = any(values.get(key) is not None for _, values in self.group.shared)
        return f"no filter matches {name}" if here else f"required by {self.method.name}"

    def _place(self, where: str) -> str:
        """Turn `weight[1]` of the resolved parameters into a place in the spec; of nothing, into the group's."""
        if not where:
            return self.group.path
        key, _, rest = where.partition("[")
        blocks = [self.slots[int(rest.rstrip("]"))].block] if rest else []
        blocks += self.group.shared
        path = next((path for path, values in blocks if key in values), "parameters")
        return f"{path}.{key}"


def _faults(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return _case_faults(value)
    if not isinstance(value, list):
        return [] if isinstance(value, float | int | bool | str) else [f"expected a value, got {value!r}"]
    if not value:
        return ["an empty list"]
    if all(_is_number(v) for v in value):
        return []
    if all(isinstance(v, Mapping) for v in value):
        return [fault for case in value for fault in _case_faults(case)]
    return ["a list holds either numbers (anchors over the layers) or {filter, value} entries"]


def _case_faults(case: Mapping[str, Any]) -> list[str]:
    unknown = [key for key in case if key not in ("filter", "value")]
    if unknown:
        return [f"unknown key {unknown[0]!r} beside filter and value"]
    if "value" not in case:
        return ["an entry without value"]
    pattern = case.get("filter")
    if pattern is not None and not isinstance(pattern, str):
        return [f"a filter is text, got {pattern!r}"]
    if pattern and pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            return [f"filter {pattern!r} is not a regular expression ({error})"]
    return _faults(case["value"])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
