"""Which tensors share a coefficient, and the merge spec that says the same."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoints.layout import Layout, layer_of
from toolkit.merge.learning.spec import Granularity
from toolkit.merge.parameters import matches

Values = NDArray[np.float64]
"""One coefficient per model and group, `[M, G]`."""


class Blocks:
    """The groups of tensors of a model.

    Args:
        names: of its tensors that models change.
        granularity: what shares a coefficient.
        filters: of declared groups; name -> filters, as in a merge's parameters.

    Attributes:
        groups: name of each group.
        index: group of each tensor.
    """

    def __init__(
        self,
        names: Sequence[str],
        granularity: Granularity = "task",
        filters: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.names, self.granularity, self.filters = list(names), granularity, filters or {}
        layout = Layout(names)
        labels = [self._label(name, layout) for name in names]
        self.groups = list(dict.fromkeys(labels))
        self.index = {name: self.groups.index(label) for name, label in zip(names, labels, strict=True)}

    def _label(self, name: str, layout: Layout) -> str:
        if self.granularity == "task":
            return "all"
        if self.granularity == "tensor":
            return name
        if self.granularity == "groups":
            found = (g for g, filters in self.filters.items() if any(matches(f, name) for f in filters))
            return next(found, "rest")
        layer = layer_of(name)
        if layer is None:
            return "before the layers" if layout.depth(name) == 0 else "after the layers"
        return f"{layer[0]}.{layer[1]}."

    def filter_of(self, group: int) -> str | None:
        """Return a filter of a merge's parameters that matches the tensors of a group and no others."""
        label = self.groups[group]
        names = [name for name in self.names if self.index[name] == group]
        if self.granularity == "task":
            return None
        if self.granularity == "layer" and layer_of(names[0]) is not None:
            return "re:^" + re.escape(label)
        return "re:^(" + "|".join(map(re.escape, names)) + ")$"

    def parameter(self, row: NDArray[np.float64]) -> float | list[dict[str, Any]]:
        """Return one model's coefficients `[G]` as a parameter of a merge: a number, or a list of filters."""
        if self.granularity == "task":
            return float(row[0])
        return [{"filter": self.filter_of(g), "value": float(value)} for g, value in enumerate(row)]


def merge_spec(
    template: Mapping[str, Any], models: Sequence[object], blocks: Blocks, values: Values, dtype: str | None
) -> dict[str, Any]:
    """Return the plain merge spec of learned coefficients.

    Args:
        template: method, base and parameters of the merge.
        models: in order.
        blocks: of the tensors.
        values: `[M, G]`.
        dtype: of the output, or `None`.
    """
    spec = dict(template)
    spec["models"] = [
        {"model": model, "parameters": {"weight": blocks.parameter(row)}}
        for model, row in zip(models, values, strict=True)
    ]
    return spec | ({"out_dtype": dtype} if dtype else {})
