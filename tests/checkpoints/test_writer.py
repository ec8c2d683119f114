"""Folders are whole or absent, and what is written loads with the safetensors library."""

from __future__ import annotations

import errno
import json
import multiprocessing
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from toolkit.checkpoints.companions import write_card
from toolkit.checkpoints.dtypes import DTYPES
from toolkit.checkpoints.headers import TensorInfo
from toolkit.checkpoints.reader import INDEX, open_checkpoint
from toolkit.checkpoints.writer import (
    WeightsWriter,
    check_space,
    locked,
    plan_shards,
    staged,
    staging_path,
    write_weights,
)
from toolkit.errors import OutputError


def infos(**shapes: tuple[int, ...]) -> list[TensorInfo]:
    return [TensorInfo(name, DTYPES["F32"], shape) for name, shape in shapes.items()]


def test_shards_filled_in_any_order_load_elsewhere(tmp_path):
    generator = np.random.default_rng(0)
    shapes = {f"layer.{i}": (int(generator.integers(1, 9)), 5) for i in range(9)}
    tensors = infos(**shapes)
    data = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    shards = plan_shards(tensors, limit=200)
    writer = WeightsWriter(tmp_path, shards)
    for name in reversed(shapes):
        flat = data[name].reshape(-1)
        for start in reversed(range(len(flat))):
            writer.write(name, start, flat[start : start + 1].view(np.uint8))
    writer.write_index()
    writer.close()
    found = {}
    for file in tmp_path.glob("model-*.safetensors"):
        found |= load_file(file)
    assert len(shards) > 2
    assert all(np.array_equal(found[name].numpy(), data[name]) for name in shapes)
    assert json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"] == sum(v.nbytes for v in data.values())
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == set(shapes)


def test_shards_respect_their_limit_but_for_a_single_large_tensor():
    shards = plan_shards(infos(a=(10,), b=(100,), c=(10,), d=(10,)), limit=100)
    sizes = [[t.name for t in shard] for shard in shards.values()]
    assert sizes == [["a"], ["b"], ["c", "d"]]
    assert list(plan_shards(infos(a=(3,)))) == ["model.safetensors"]


def test_every_tensor_is_aligned_to_its_elements(tmp_path):
    tensors = [TensorInfo("odd", DTYPES["U8"], (3,)), TensorInfo("wide", DTYPES["F64"], (2,)), *infos(f=(1,))]
    write_weights(tmp_path, tensors, {t.name: np.zeros(t.nbytes, np.uint8) for t in tensors})
    with open_checkpoint(tmp_path) as checkpoint:
        assert all(info.offset % (info.dtype.bits // 8) == 0 for info in checkpoint.tensors.values())
        assert torch.equal(checkpoint.tensor("wide"), torch.zeros(2, dtype=torch.float64))


def test_failure_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), staged(tmp_path / "out") as partial:
        (partial / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_kept_unless_overwritten(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(OutputError, match="exists already"), staged(out):
        pass
    with pytest.raises(RuntimeError), staged(out, overwrite=True):
        raise RuntimeError
    assert (out / "mine").read_text() == "x"
    with staged(out, overwrite=True) as partial:
        (partial / "new").write_text("y")
    assert [p.name for p in out.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"), staged(tmp_path / "file"):
        pass


def test_output_behind_a_link_is_replaced_where_it_is(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for text in ("one", "two"):
        with staged(tmp_path / "link", overwrite=True) as partial:
            (partial / "file").write_text(text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real" / "file").read_text() == text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]
    (tmp_path / "dangling").symlink_to(tmp_path / "not" / "yet")
    with staged(tmp_path / "dangling") as partial:
        (partial / "file").write_text("x")
    assert (tmp_path / "not" / "yet" / "file").read_text() == "x"
    monkeypatch.setenv("HOME", str(tmp_path))
    with staged(Path("~/own")):
        pass
    assert (tmp_path / "own").is_dir()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(OutputError, match="in a circle"), staged(tmp_path / "circle"):
        pass


def test_current_folder_is_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out, message in ((".", "is the current folder"), ("..", "holds the current folder"), ("/", "holds the")):
        with pytest.raises(OutputError, match=message), staged(Path(out), overwrite=True):
            pass
    assert (tmp_path / "here").is_dir()


def test_folder_that_cannot_be_renamed_is_kept(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    rename = Path.rename

    def refuse(self, target):
        if self.name.endswith(".partial"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match="busy"), staged(out, overwrite=True):
        pass
    assert (out / "mine").read_text() == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_card_names_the_wanted_libraries(tmp_path):
    write_card(tmp_path, "A model", "What it is.", tags=[], libraries=["torch", "no-such-library"])
    last = (tmp_path / "README.md").read_text().splitlines()[-1]
    assert f"torch {metadata.version('torch')}" in last
    assert f"numpy {metadata.version('numpy')}" in last
    assert "no-such-library" not in last


def _hold(path: str, ready, done) -> None:
    with locked(staging_path(Path(path))):
        ready.set()
        done.wait(20)


def test_second_process_is_refused(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path / "out"), ready, done))
    other.start()
    try:
        assert ready.wait(60)
        with pytest.raises(OutputError, match="another process is writing"), staged(tmp_path / "out"):
            pass
    finally:
        done.set()
        other.join()


def test_too_little_space_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(OutputError, match=r"needs 1000\.0 TB, the disk has"):
        check_space(tmp_path / "not" / "there" / "yet", 10**15)


def test_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write there"), staged(tmp_path / "file" / "out"):
        pass
