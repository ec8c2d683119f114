"""Specs: what is read, what is refused, and that a fault is told at its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import Field

from toolkit import specs
from toolkit.adapters.spec import TrainSpec
from toolkit.errors import SpecError
from toolkit.evaluation.spec import EvaluateSpec
from toolkit.specs import Folder, FolderOrObject, Spec


class Small(Spec):
    """A spec of a few keys."""

    out: Folder | None = None
    model: FolderOrObject | None = None
    values: dict[str, Any] = Field(default_factory=dict)
    items: list[Any] = Field(default_factory=list)


class Thing:
    """An object that refuses to be copied."""

    def __deepcopy__(self, memo: object) -> Thing:
        raise AssertionError("copied")


def test_objects_in_a_spec_stay_the_same():
    model, tokenizer = Thing(), Thing()
    given = {"base": (model, tokenizer), "data": {"train": ["a.jsonl"]}}
    loaded = specs.load(given, TrainSpec, overrides=["data.train[0]=b.jsonl"])
    assert loaded.base[0] is model
    assert loaded.base[1] is tokenizer
    assert (loaded.data.train, given["data"]) == (["b.jsonl"], {"train": ["a.jsonl"]}), "the caller's dict is kept"
    table = specs.load({"base": (model, tokenizer), "models": {"m": (model, 1)}, "tasks": {"t": "x"}}, EvaluateSpec)
    assert table.models["m"][0] is model


def test_instance_cannot_be_changed():
    spec = Small(out="a")
    assert specs.load(spec, Small) is spec
    changed: list[dict[str, Any]] = [{"overrides": ["out=b"]}, {"options": {"out": "b"}}, {"smoke": True}]
    for changes in changed:
        with pytest.raises(SpecError, match="a Small is final; give its file or a dict"):
            specs.load(spec, Small, **changes)
    with pytest.raises(SpecError, match="expected a TrainSpec, a file or a dict, got a Small"):
        specs.load(spec, TrainSpec)
    with pytest.raises(SpecError, match="a spec is a YAML file or a dict, not a int"):
        specs.load(5, Small)  # pyright: ignore[reportArgumentType]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "spec.yaml").write_text("out: ~/runs\nmodel: ~/model\n")
    loaded = specs.load("~/spec.yaml", Small)
    assert (loaded.out, loaded.model) == (f"{tmp_path}/runs", f"{tmp_path}/model")
    assert specs.load({"out": Path("~/runs")}, Small).out == f"{tmp_path}/runs"
    with pytest.raises(SpecError, match="model: expected a folder, a hub id, or an object in memory, got 5"):
        specs.load({"model": 5}, Small)


@pytest.mark.parametrize(
    ("text", "value"),
    [("2020-13-45", "2020-13-45"), ("2020-11-25", "2020-11-25"), ("2020-01-01 10:00:00", "2020-01-01 10:00:00")],
)
def test_dates_are_text(text, value, tmp_path):
    (tmp_path / "spec.yaml").write_text(f"out: {text}\n")
    assert specs.load(tmp_path / "spec.yaml", Small).out == value
    assert specs.load({}, Small, overrides=[f"out={text}"]).out == value


def test_the_loader_of_others_still_reads_dates():
    assert not isinstance(yaml.safe_load("2020-11-25"), str)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"out: caf\xe9\n", "spec.yaml: not UTF-8 text"),
        (b"out: !!timestamp 2020-13-45\n", "spec.yaml: not valid YAML: month must be in 1..12"),
        (b"out: !!int x\n", "spec.yaml: not valid YAML"),
        (b"out: " + b"1" * 5000 + b"\n", "spec.yaml: not valid YAML"),
        (b"items: &a [*a]\n", "spec.yaml: not usable YAML: nested too deeply, or within itself"),
        (b"items: " + b"[" * 5000, "spec.yaml: not usable YAML: nested too deeply"),
        (b"{[1, 2]: 3}\n", "spec.yaml: not valid YAML: line 1, column 2: found unhashable key"),
    ],
)
def test_files_that_cannot_be_read(content, message, tmp_path):
    (tmp_path / "spec.yaml").write_bytes(content)
    with pytest.raises(SpecError) as caught:
        specs.load(tmp_path / "spec.yaml", Small)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", [".=1", "=1", "out", "values..a=1", "items[x]=1", "items[0=1", "values.[0]=1"])
def test_overrides_that_name_nothing(override):
    with pytest.raises(SpecError, match=r"is not of the form key\.path=value"):
        specs.load({"items": [1]}, Small, overrides=[override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("[0]=1", "is not in the spec"),
        ("items[1]=1", "is not in the spec"),
        ("items.a=1", "is not in the spec"),
        ("out=!!timestamp 2020-13-45", "the value is not valid YAML"),
        ("out=" + "[" * 5000, "the value is not valid YAML"),
    ],
)
def test_overrides_that_do_not_fit(override, message):
    with pytest.raises(SpecError, match=message):
        specs.load({"items": [1]}, Small, overrides=[override])
    assert specs.load({"items": [1]}, Small, overrides=["items[0]=2", "values.a.b-c=3"]).values == {"a": {"b-c": 3}}
