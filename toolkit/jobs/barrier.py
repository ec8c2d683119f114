"""Measure the barrier between a reference and a model, before and after the model was aligned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from toolkit.checkpoints.layout import layer_of
from toolkit.data.render import Example, Renderer
from toolkit.data.rows import Row, read_rows
from toolkit.evaluation.metrics import likelihood
from toolkit.merge.align.barrier import Line, walk
from toolkit.models.load import LoadedModel, load_model, pick_device
from toolkit.progress import Progress, track
from toolkit.tables import Cell, Table

MAX_LENGTH = 1024
"""Most tokens of a row that is measured."""

Layer = tuple[str, int]


@dataclass(frozen=True)
class Barriers:
    """What was measured, by `before` and `after`.

    Attributes:
        lines: from the reference to the model.
        layers: barrier half way of each layer, all else as in the reference; empty where it was not asked for.
        rows: how many were measured on.
    """

    lines: Mapping[str, Line]
    layers: Mapping[str, Mapping[str, float]]
    rows: int

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers."""
        found: dict[str, Any] = {"alphas": list(self.lines["before"].alphas), "rows": self.rows}
        for when, line in self.lines.items():
            found[when] = {"loss": list(line.losses), "barrier": line.barriers, "highest": line.highest}
        return found | ({"layers": {when: dict(x) for when, x in self.layers.items()}} if self.layers else {})

    def tables(self) -> list[Table]:
        """Return a table of the lines, and one of the layers where they were measured."""
        before, after = self.lines["before"], self.lines["after"]
        points = zip(before.alphas, before.losses, before.barriers, after.losses, after.barriers, strict=True)
        columns = ("alpha", "loss before", "barrier before", "loss after", "barrier after")
        found = [Table(columns, [list(row) for row in points], "From the reference (0) to the model (1)", digits=4)]
        if self.layers:
            cells: list[list[Cell]] = [[n, x, self.layers["after"][n]] for n, x in self.layers["before"].items()]
            found.append(Table(("layer", "before", "after"), cells, "Barrier of single layers, half way", digits=4))
        return found


class Ruler:
    """What the barrier is measured on, and how; the rows are read at once.

    Args:
        data: JSONL files.
        limit: first rows to take; by default all.
        points: of the line, both ends included.
        by_layer: also measure every layer.
        device: to measure on.
        trust_remote_code: run code that comes with the models.

    Raises:
        DataError: rows that cannot be read.
        UnsupportedError: the device is not there.
    """

    def __init__(
        self,
        data: str | Path | Sequence[str | Path],
        *,
        limit: int | None,
        points: int,
        by_layer: bool,
        device: str,
        trust_remote_code: bool,
    ) -> None:
        self.rows: list[Row] = read_rows(data)[:limit]
        self.alphas = [i / (points - 1) for i in range(points)]
        self.by_layer = by_layer
        self.options: dict[str, Any] = {"device": pick_device(device), "trust_remote_code": trust_remote_code}

    def measure(self, reference: str | Path, before: str | Path, after: str | Path, *, quiet: bool) -> Barriers:
        """Measure the lines from a reference to a model as it was, and as it is once aligned."""
        start = load_model(reference, **self.options)
        examples = _examples(self.rows, start)
        layers = sorted({found for name, _ in start.model.named_parameters() if (found := layer_of(name))})
        layers = layers if self.by_layer else []
        lines: dict[str, Line] = {}
        middles: dict[str, dict[str, float]] = {}
        with track("measuring", 2 * (len(self.alphas) + 3 * len(layers)), unit="models", quiet=quiet) as progress:
            loss = _Loss(examples, int(start.tokenizer.pad_token_id or 0), progress)
            for when, place in (("before", before), ("after", after)):
                end = load_model(place, **self.options).model
                lines[when] = walk(start.model, end, self.alphas, loss)
                middles[when] = {f"{s}.{i}": _half_way(start.model, end, (s, i), loss) for s, i in layers}
        return Barriers(lines, middles if layers else {}, len(examples))


class _Loss:
    """Returns the loss of a model on the rows, and counts."""

    def __init__(self, examples: Sequence[Example], pad: int, progress: Progress) -> None:
        self.examples, self.pad, self.progress = examples, pad, progress

    def __call__(self, model: nn.Module) -> float:
        self.progress.advance()
        return likelihood(model, self.examples, pad=self.pad).loss


def _examples(rows: Sequence[Row], reference: LoadedModel) -> list[Example]:
    context = getattr(reference.model.config, "max_position_embeddings", None) or MAX_LENGTH
    renderer = Renderer(reference.tokenizer, min(MAX_LENGTH, context), too_long="truncate", empty="skip")
    return renderer.render_all(rows)[0]


def _half_way(start: nn.Module, end: nn.Module, layer: Layer, loss: _Loss) -> float:
    return walk(start, end, (0.0, 0.5, 1.0), loss, among=lambda name: layer_of(name) == layer).barriers[1]
