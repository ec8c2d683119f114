"""What a composition is, as YAML writes it: a tree whose leaves are names of adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from toolkit.errors import Problem, SpecError
from toolkit.names import did_you_mean

Rule = Literal["scalearn", "scalearn_uniform", "scalearn++", "scalearn_uniform++", "adapter_fusion"]
"""How `fuse` mixes: with trained scales (the names are ScaLearn's), or with trained attention over the outputs."""


@dataclass(frozen=True)
class Leaf:
    """One adapter."""

    name: str

    @property
    def nodes(self) -> tuple[Node, ...]:
        """None."""
        return ()


@dataclass(frozen=True)
class Stack:
    """One after another: each gets the module as the ones before it have changed it."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Average:
    """Differences to the module's output, weighted by numbers that are not trained."""

    nodes: tuple[Node, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Parallel:
    """Each for an equal part of the rows of a batch: the first rows for the first, and so on."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Fuse:
    """Differences to the module's output, mixed by what is trained.

    Attributes:
        nodes: that are mixed.
        by: the rule.
        start: every scale at first; `1 / nodes` by default. Not for `adapter_fusion`.
    """

    nodes: tuple[Node, ...]
    by: Rule = "scalearn"
    start: float | None = None


Node = Leaf | Stack | Average | Parallel | Fuse

_OPTIONS = {"stack": (), "average": ("weights",), "parallel": (), "fuse": ("by", "start")}


def parse(value: Any, where: str = "compose") -> Node:
    """Read a tree from what YAML gives: a name, or a mapping such as `{average: [a, b], weights: [0.7, 0.3]}`.

    Raises:
        SpecError: it is no tree; holds all its faults, each at its key path.
    """
    problems: list[Problem] = []
    node = _node(value, where, problems)
    names = [leaf.name for leaf in leaves(node)] if node else []
    twice = sorted({name for name in names if names.count(name) > 1})
    problems += [Problem(where, f"{name} is named twice; give it a second name among the sources") for name in twice]
    if problems or node is None:
        raise SpecError(problems)
    return node


def data(node: Node) -> Any:
    """Return what `parse` reads as this tree."""
    if isinstance(node, Leaf):
        return node.name
    inner = [data(one) for one in node.nodes]
    match node:
        case Stack():
            return {"stack": inner}
        case Parallel():
            return {"parallel": inner}
        case Average():
            return {"average": inner, "weights": list(node.weights)}
        case Fuse():
            return {"fuse": inner, "by": node.by, **({} if node.start is None else {"start": node.start})}


def leaves(node: Node) -> Iterator[Leaf]:
    """Yield the leaves from left to right."""
    if isinstance(node, Leaf):
        yield node
    for inner in node.nodes:
        yield from leaves(inner)


def fuses(node: Node) -> Iterator[Fuse]:
    """Yield the nodes that have something to train, each before those in it."""
    if isinstance(node, Fuse):
        yield node
    for inner in node.nodes:
        yield from fuses(inner)


def _node(value: Any, where: str, problems: list[Problem]) -> Node | None:
    if isinstance(value, str):
        return Leaf(value)
    kinds = [key for key in _OPTIONS if isinstance(value, Mapping) and key in value]
    if len(kinds) != 1:
        problems.append(Problem(where, f"expected a name or one of {', '.join(_OPTIONS)}, got {value!r}"))
        return None
    (kind,) = kinds
    options = _OPTIONS[kind]
    unknown = [key for key in value if key not in (kind, *options)]
    problems += [Problem(f"{where}.{key}", f"{kind} has no key {key!r}{did_you_mean(key, options)}") for key in unknown]
    listed = value[kind]
    if not isinstance(listed, list | tuple) or not listed:
        problems.append(Problem(f"{where}.{kind}", f"expected a list of names and of trees, got {listed!r}"))
        return None
    found = [_node(inner, f"{where}.{kind}[{i}]", problems) for i, inner in enumerate(listed)]
    nodes = tuple(node for node in found if node is not None)
    return _made(kind, nodes, value, where, problems) if len(nodes) == len(found) else None


def _made(
    kind: str, nodes: tuple[Node, ...], value: Mapping[str, Any], where: str, problems: list[Problem]
) -> Node | None:
    if kind == "stack":
        return Stack(nodes)
    if kind == "parallel":
        return Parallel(nodes)
    if kind == "average":
        weights = value.get("weights") or [1 / len(nodes)] * len(nodes)
        if not isinstance(weights, list | tuple) or len(weights) != len(nodes) or not all(map(_is_number, weights)):
            problems.append(Problem(f"{where}.weights", f"expected {len(nodes)} numbers, got {weights!r}"))
            return None
        return Average(nodes, tuple(map(float, weights)))
    by, start = value.get("by", "scalearn"), value.get("start")
    if by not in get_args(Rule):
        known = ", ".join(get_args(Rule))
        problems.append(
            Problem(f"{where}.by", f"no rule {by!r}{did_you_mean(str(by), get_args(Rule))} (known: {known})")
        )
    if start is not None and (not _is_number(start) or by == "adapter_fusion"):
        problems.append(Problem(f"{where}.start", f"expected a number, and a rule with scales, got {start!r} and {by}"))
    return Fuse(nodes, by, start)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
