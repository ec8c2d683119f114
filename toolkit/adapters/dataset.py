"""From the data of a spec to what is trained: read, rendered, mixed, packed; all of it first, or as a stream."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from toolkit.adapters import catalogue
from toolkit.adapters.loader import Steps, order_of
from toolkit.adapters.parts import Parts, parts_of
from toolkit.adapters.spec import SourceSpec, TrainSpec
from toolkit.data.batches import padding_share
from toolkit.data.groups import Item, num_tokens, num_trained
from toolkit.data.mix import counts, draw, shares
from toolkit.data.pack import Packed, pack
from toolkit.data.render import Renderer, RenderReport
from toolkit.data.rows import Row, read_source
from toolkit.models.load import LoadedModel


@dataclass(frozen=True)
class Dataset:
    """What is trained in one epoch, or what is evaluated.

    Attributes:
        rows: to train; of a stream the first few.
        report: what became of the rows that were read, and how much of the batches is padding.
        stream: the batches of a stream.
    """

    rows: list[Item]
    report: dict[str, Any]
    stream: Steps | None = None

    @property
    def tokens(self) -> float:
        """Tokens of a row, on average."""
        return sum(map(num_tokens, self.rows)) / len(self.rows)


def train_set(spec: TrainSpec, loaded: LoadedModel, parts: Parts | None = None, folder: Path | None = None) -> Dataset:
    """Return what a spec trains.

    Args:
        spec: of the run.
        loaded: its model.
        parts: its objective and methods.
        folder: of the run, if there is one.

    Raises:
        MissingError: no such file or data set.
        DataError: a row that cannot be used, or none that can.
    """
    parts = parts or parts_of(spec)
    if spec.data.streaming:
        return _streamed(spec, loaded, parts)
    data, training = spec.data, spec.training
    sources = data.sources()
    made, reports = _made(spec, sources, Maker(spec, loaded, parts), folder)
    weights = [source.weight for source in sources if source.weight is not None]
    if weights or data.temperature is not None:
        share = shares([len(items) for items in made], weights or None, data.temperature or 1)
        taken = counts(share, data.epoch_rows or sum(map(len, made)))
        rng = random.Random(training.seed)
        made = [[e[i] for i in draw(len(e), n, rng)] for e, n in zip(made, taken, strict=True)]
    rows = _packed(spec, parts, [item for items in made for item in items], _longest(spec, loaded))
    report = {**_counted(reports, made), "padding": _padding(spec, rows)}
    if len(sources) > 1:
        report["sources"] = {s.path: len(e) for s, e in zip(sources, made, strict=True)}
    return Dataset(rows, report)


def _padding(spec: TrainSpec, rows: Sequence[Item]) -> float:
    return round(padding_share([len(row.tokens) for row in rows], order_of(spec, rows).together()), 4)


def validation_set(spec: TrainSpec, loaded: LoadedModel, parts: Parts | None = None) -> Dataset | None:
    """Return the rows that a spec measures the loss on, longest first, or `None`.

    Raises:
        As `train_set`.
    """
    sources, parts = spec.data.sources(validation=True), parts or parts_of(spec)
    if not sources:
        return None
    made, reports = _made(spec, sources, Maker(spec, loaded, parts))
    rows = _packed(spec, parts, [item for items in made for item in items], _longest(spec, loaded))
    return Dataset(sorted(rows, key=lambda row: -len(row.tokens)), _counted(reports, made))


class Maker:
    """Makes what is trained of rows.

    Args:
        spec: of the run.
        loaded: its model.
        parts: its objective and methods.
    """

    def __init__(self, spec: TrainSpec, loaded: LoadedModel, parts: Parts) -> None:
        self.loaded, self.parts, self.known = loaded, parts, tasks(spec)
        self.render = renderer(spec, loaded, whole=parts.objective.whole)

    def item(self, row: Row, source: SourceSpec, report: RenderReport) -> Item | None:
        """Return the item of a row, or `None` where it is left out.

        Raises:
            DataError: the row cannot be used.
        """
        examples = self.render.render_counted(self.parts.objective.texts(row), report)
        task = self.known.index(source.task) if source.task in self.known else 0
        return self.parts.objective.item(row, examples, task) if examples else None


def _made(
    spec: TrainSpec, sources: Iterable[SourceSpec], maker: Maker, folder: Path | None = None
) -> tuple[list[list[Item]], list[RenderReport]]:
    """Return the items of every source; rows that are trained (there is a folder) pass through the methods first."""
    made, reports = [], []
    for source in sources:
        rows = list(_read(source))
        if folder is not None:
            for method in maker.parts.methods:
                rows = method.rows(rows, source, maker.loaded, folder)
        report = RenderReport()
        made.append([item for row in rows if (item := maker.item(row, source, report)) is not None])
        report.check(rows)
        reports.append(report)
    return made, reports


def _read(source: SourceSpec, *, streaming: bool = False) -> Iterator[Row]:
    return read_source(source.path, split=source.split, subset=source.subset, fields=source.fields, streaming=streaming)


def _streamed(spec: TrainSpec, loaded: LoadedModel, parts: Parts) -> Dataset:
    """Return the first rows of a stream, and its batches."""
    maker, longest, t = Maker(spec, loaded, parts), _longest(spec, loaded), spec.training
    first = list(islice(_drawn(spec, maker), min(spec.data.buffer, 200)))
    rows = _packed(spec, parts, first, longest)
    report = {"rows": len(first), "tokens": sum(map(num_tokens, first)), "trained": sum(map(num_trained, first))}
    steps = Steps(
        lambda: _drawn(spec, maker),
        t.batch_size,
        seed=t.seed,
        by_length=spec.data.batches == "by_length",
        buffer=spec.data.buffer,
        pack=lambda items: _packed(spec, parts, items, longest),
    )
    return Dataset(rows, {**report, "padding": _padding(spec, rows), "streaming": True}, steps)


def _drawn(spec: TrainSpec, maker: Maker) -> Iterator[Item]:
    """Yield rows of all sources without end, each source as often as its weight says."""
    sources = spec.data.sources()
    rng = random.Random(f"{spec.training.seed} stream")
    weights = [source.weight or 1.0 for source in sources]
    streams = [_endless(source, maker) for source in sources]
    while True:
        (stream,) = rng.choices(streams, weights)
        yield next(stream)


def _endless(source: SourceSpec, maker: Maker) -> Iterator[Item]:
    """Yield the rows of a source again and again.

    Raises:
        DataError: a row that cannot be used, or none that can.
    """
    while True:
        report, rows = RenderReport(), []
        for row in _read(source, streaming=True):
            rows = rows or [row]
            item = maker.item(row, source, report)
            if item is not None:
                yield item
        report.check(rows)


def tasks(spec: TrainSpec) -> list[str]:
    """Return the tasks of a spec's data; the number of a task is its place here."""
    return list(dict.fromkeys(source.task for source in spec.data.sources() if source.task is not None))


def context(loaded: LoadedModel) -> int | None:
    """Return the most tokens of a row that the positions of a model reach, where its config says so."""
    config = loaded.model.config.get_text_config()
    reached = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    adapter = getattr(loaded.model, "peft_config", {}).get("default")
    return reached and reached - (getattr(adapter, "num_virtual_tokens", None) or 0)


def renderer(spec: TrainSpec, loaded: LoadedModel, *, whole: bool = False) -> Renderer:
    """Return what makes tokens of a spec's rows; `whole` is that of their objective."""
    data = spec.data
    options = {"train_on_inputs": data.train_on_inputs, "context": context(loaded), "whole": whole}
    return Renderer(loaded.tokenizer, _longest(spec, loaded), data.too_long, data.empty, **options)


def _longest(spec: TrainSpec, loaded: LoadedModel) -> int:
    return spec.data.max_length or min(context(loaded) or 1024, loaded.tokenizer.model_max_length)


def _packed(spec: TrainSpec, parts: Parts, items: list[Item], longest: int) -> list[Item]:
    """Pack, tasks apart where they must be known; positions start anew in every document.

    So a packed row may be longer than the model's context.
    """
    documents = [item for item in items if isinstance(item, Packed)]
    if not spec.data.packing or len(documents) < len(items):
        return items
    method = catalogue.find(spec.adapter.method)
    if not parts.needs_tasks and (method is None or method.task_field is None):
        return [*pack(documents, longest)]
    apart = {item.task: [e for e in documents if e.task == item.task] for item in documents}
    return [row for of_task in apart.values() for row in pack(of_task, longest)]


def _counted(reports: Iterable[RenderReport], made: Iterable[list[Item]]) -> dict[str, Any]:
    """Add up what was read, and the tokens of what is trained in an epoch."""
    total = RenderReport()
    for report in reports:
        total.rows, total.kept = total.rows + report.rows, total.kept + report.kept
        total.truncated += report.truncated
        for reason, places in report.skipped.items():
            total.skipped.setdefault(reason, []).extend(places)
    for items in made:
        total.tokens += sum(map(num_tokens, items))
        total.trained += sum(map(num_trained, items))
    return total.to_dict()
