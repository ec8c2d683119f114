"""From the data of a spec to rows of tokens: read, rendered, mixed, packed."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from toolkit.adapters import catalogue
from toolkit.adapters.spec import SourceSpec, TrainSpec
from toolkit.data.batches import batch_order, padding_share
from toolkit.data.mix import counts, draw, shares
from toolkit.data.pack import Packed, alone, pack
from toolkit.data.render import Example, Renderer, RenderReport
from toolkit.data.rows import read_source
from toolkit.models.load import LoadedModel


@dataclass(frozen=True)
class Dataset:
    """What is trained in one epoch, or what is evaluated.

    Attributes:
        rows: to train.
        report: what became of the rows that were read, and how much of the batches is padding.
    """

    rows: list[Packed]
    report: dict[str, Any]


def train_set(spec: TrainSpec, loaded: LoadedModel) -> Dataset:
    """Return the rows that a spec trains.

    Raises:
        MissingError: no such file or data set.
        DataError: a row that cannot be used, or none that can.
    """
    data, training = spec.data, spec.training
    sources = data.sources()
    rendered, reports = _rendered(spec, sources, loaded)
    weights = [source.weight for source in sources if source.weight is not None]
    if weights or data.temperature is not None:
        parts = shares([len(examples) for examples in rendered], weights or None, data.temperature or 1)
        taken = counts(parts, data.epoch_rows or sum(map(len, rendered)))
        rng = random.Random(training.seed)
        rendered = [[e[i] for i in draw(len(e), n, rng)] for e, n in zip(rendered, taken, strict=True)]
    rows = _packed(spec, rendered, _longest(spec, loaded))
    lengths = [len(row.tokens) for row in rows]
    order = batch_order(
        lengths, training.batch_size, seed=training.seed, epoch=0, by_length=data.batches == "by_length"
    )
    padding = padding_share([lengths[i] for i in order], training.batch_size)
    report = {**_counted(reports, rendered), "padding": round(padding, 4)}
    if len(sources) > 1:
        report["sources"] = {s.path: len(e) for s, e in zip(sources, rendered, strict=True)}
    return Dataset(rows, report)


def validation_set(spec: TrainSpec, loaded: LoadedModel) -> Dataset | None:
    """Return the rows that a spec measures the loss on, longest first, or `None`.

    Raises:
        As `train_set`.
    """
    sources = spec.data.sources(validation=True)
    if not sources:
        return None
    rendered, reports = _rendered(spec, sources, loaded)
    rows = _packed(spec, rendered, _longest(spec, loaded))
    return Dataset(sorted(rows, key=lambda row: -len(row.tokens)), _counted(reports, rendered))


def tasks(spec: TrainSpec) -> list[str]:
    """Return the tasks of a spec's data; the number of a task is its place here."""
    return list(dict.fromkeys(source.task for source in spec.data.sources() if source.task is not None))


def context(loaded: LoadedModel) -> int | None:
    """Return the most tokens of a row that the positions of a model reach, where its config says so."""
    config = loaded.model.config.get_text_config()
    reached = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    adapter = getattr(loaded.model, "peft_config", {}).get("default")
    return reached and reached - (getattr(adapter, "num_virtual_tokens", None) or 0)


def renderer(spec: TrainSpec, loaded: LoadedModel) -> Renderer:
    """Return what makes tokens of a spec's rows."""
    data = spec.data
    options = {"train_on_inputs": data.train_on_inputs, "context": context(loaded)}
    return Renderer(loaded.tokenizer, _longest(spec, loaded), data.too_long, data.empty, **options)


def _longest(spec: TrainSpec, loaded: LoadedModel) -> int:
    return spec.data.max_length or min(context(loaded) or 1024, loaded.tokenizer.model_max_length)


def _rendered(
    spec: TrainSpec, sources: Iterable[SourceSpec], loaded: LoadedModel
) -> tuple[list[list[Example]], list[RenderReport]]:
    render, known = renderer(spec, loaded), tasks(spec)
    rendered, reports = [], []
    for source in sources:
        rows = list(read_source(source.path, split=source.split, subset=source.subset, fields=source.fields))
        examples, report = render.render_all(rows)
        task = known.index(source.task) if source.task in known else 0
        rendered.append([replace(e, task=task) for e in examples] if task else examples)
        reports.append(report)
    return rendered, reports


def _packed(spec: TrainSpec, rendered: Iterable[list[Example]], longest: int) -> list[Packed]:
    """Pack, tasks apart where the method must know them; positions start anew in every document.

    So a packed row may be longer than the model's context.
    """
    examples = [example for source in rendered for example in source]
    if not spec.data.packing:
        return [alone(example) for example in examples]
    method = catalogue.find(spec.adapter.method)
    if method is None or method.task_field is None:
        return pack(examples, longest)
    apart = {example.task: [e for e in examples if e.task == example.task] for example in examples}
    return [row for of_task in apart.values() for row in pack(of_task, longest)]


def _counted(reports: Iterable[RenderReport], rendered: Iterable[list[Example]]) -> dict[str, Any]:
    """Add up what was read, and the tokens of what is trained in an epoch."""
    total = RenderReport()
    for report in reports:
        total.rows, total.kept = total.rows + report.rows, total.kept + report.kept
        total.truncated += report.truncated
        for reason, places in report.skipped.items():
            total.skipped.setdefault(reason, []).extend(places)
    for examples in rendered:
        total.tokens += sum(len(e.tokens) for e in examples)
        total.trained += sum(e.num_trained for e in examples)
    return total.to_dict()
