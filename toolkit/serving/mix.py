"""What a request is answered by: the base, an adapter, or several adapters with weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.errors import RequestError

BASE, AUTO = "base", "auto"

MOST_WEIGHT = 100.0
"""Largest weight of an adapter, in either direction."""

MOST_PARTS = 16
"""Adapters that a composition can have."""

Named = Sequence[tuple[str, float]]
"""Adapters by name and their weights; none is the base."""


@dataclass(frozen=True)
class Mix:
    """Adapters by content hash and their weights, each once, in a fixed order; none is the base.

    Attributes:
        parts: key and weight of each.
        router: identity of the token router that weights them at every linear, token by token; empty where none does.
    """

    parts: tuple[tuple[str, float], ...] = ()
    router: str = ""

    @classmethod
    def of(cls, parts: Sequence[tuple[str, float]]) -> Mix:
        """Add up the weights of adapters that are named twice; those whose weights cancel are left out."""
        total: dict[str, float] = {}
        for key, weight in parts:
            total[key] = total.get(key, 0.0) + weight
        return cls(tuple(sorted((key, weight) for key, weight in total.items() if weight)))

    def routed(self, router: str) -> Mix:
        """Return the same adapters, weighted by a token router."""
        return Mix(self.parts, router)

    @property
    def keys(self) -> tuple[str, ...]:
        """Content hashes of the adapters."""
        return tuple(key for key, _ in self.parts)

    @property
    def identity(self) -> str:
        """Text that differs for mixes that compute different things."""
        if self.router:
            return f"router {self.router}"  # which holds the contents of its adapters
        return "+".join(f"{key}:{weight!r}" for key, weight in self.parts)


def parse_model(model: str) -> Named:
    """Return the adapters and weights that a model's name asks for.

    `base` is none, a name is that adapter, `a:0.6+b:0.4` and `a+b` are compositions: the base plus the weighted sum of
    what the adapters change. A weight that is not given is 1.

    Raises:
        RequestError: a weight that is no number, an adapter without a name, or too many of them.
    """
    if model == BASE:
        return ()
    parts = model.split("+")
    if len(parts) > MOST_PARTS:
        raise RequestError(f"a composition of {len(parts)} adapters, at most {MOST_PARTS}", "model_not_found")
    return tuple(_part(part, model) for part in parts)


def _part(part: str, model: str) -> tuple[str, float]:
    name, colon, text = part.strip().rpartition(":")
    if not colon:
        name, text = part.strip(), "1"
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not name or not abs(weight) <= MOST_WEIGHT:
        raise RequestError(
            f"model {model!r}: {part!r} is no adapter with a weight from -{MOST_WEIGHT:g} to {MOST_WEIGHT:g};"
            " write a:0.6+b:0.4",
            "model_not_found",
        )
    return name.strip(), weight


def show_model(parts: Named) -> str:
    """Return the name of a composition: what `parse_model` reads."""
    if not parts:
        return BASE
    return "+".join(name if weight == 1 else f"{name}:{weight!r}" for name, weight in parts)
