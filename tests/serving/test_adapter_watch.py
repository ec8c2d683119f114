"""A folder of adapters that a server looks after: what comes, changes and goes there, comes, changes and goes here."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import toolkit
from tests import tiny
from toolkit.data.rows import write_rows
from toolkit.serving.adapter_watch import AdapterWatch
from toolkit.serving.engine import Engine
from toolkit.serving.loop import EngineLoop
from toolkit.serving.request import Sampling
from toolkit.serving.serve import background_server


class Served:
    """An engine that runs, and a watch that looks when it is told to."""

    def __init__(self, loop: EngineLoop, folder: Path) -> None:
        self.loop, self.folder = loop, folder
        self.watch = AdapterWatch(loop, [folder], 1.0)

    def look(self) -> list[str]:
        """Look twice, as what has come must first come to rest; return what is served beside the base."""
        self.watch.look()
        self.watch.look()
        return sorted(self.loop.engine.adapters.infos)

    def version(self, name: str) -> str:
        return self.loop.engine.adapters.infos[name].key


@pytest.fixture
def served(base, loras, tmp_path) -> Iterator[Served]:
    shutil.copytree(loras["plain"], tmp_path / "folder" / "first")
    with Engine(str(base), {"own": loras["few"]}) as engine:
        loop = EngineLoop(engine)
        loop.start()
        yield Served(loop, tmp_path / "folder")
        loop.stop()


def reasons(caplog) -> list[str]:
    return [record.fields["reason"] for record in caplog.records if record.message == "adapter refused"]


def test_adapters_come_change_and_go(served, loras, base):
    served.watch.look()
    assert sorted(served.loop.engine.adapters.infos) == ["first", "own"], (
        "what is there from the start is not waited for"
    )
    shutil.copytree(loras["wide"], served.folder / "second")
    served.watch.look()
    assert "second" not in served.loop.engine.adapters.infos, "it may still be written"
    assert served.look() == ["first", "own", "second"]
    before = served.version("first")
    shutil.rmtree(served.folder / "first")
    shutil.copytree(loras["rslora"], served.folder / "first")
    assert served.look() == ["first", "own", "second"]
    assert served.version("first") != before
    answer = served.loop.call(
        lambda engine: engine.generate([[1, 2, 3]], "first", Sampling(max_tokens=6, ignore_eos=True))[0]
    ).result()
    assert answer.tokens == tiny.greedy(tiny.load_merged(base, loras["rslora"]), [1, 2, 3], 6)
    shutil.rmtree(served.folder / "second")
    assert served.look() == ["first", "own"]


def test_what_cannot_be_served_is_refused_once_and_taken_when_it_is_mended(served, loras, caplog):
    caplog.set_level(logging.INFO, "toolkit.serving")
    half = served.folder / "half"
    half.mkdir()
    shutil.copyfile(loras["wide"] / "adapter_config.json", half / "adapter_config.json")
    for _ in range(3):
        assert served.look() == ["first", "own"]
    assert len(reasons(caplog)) == 1
    shutil.copyfile(loras["wide"] / "adapter_model.safetensors", half / "adapter_model.safetensors")
    assert served.look() == ["first", "half", "own"]
    shutil.copytree(loras["wide"], served.folder / "own")
    shutil.copytree(loras["wide"], served.folder / "a+b")
    version = served.version("own")
    assert served.look() == ["first", "half", "own"]
    assert served.version("own") == version
    assert "the name 'own' is served already" in reasons(caplog)[-1]
    assert any("a+b" in reason for reason in reasons(caplog))
    (served.folder / ".hidden").mkdir()
    (served.folder / "a file").touch()
    assert served.look() == ["first", "half", "own"]


def test_a_folder_that_is_not_there_yet(served, loras, tmp_path):
    watch = AdapterWatch(served.loop, [tmp_path / "later"], 1.0)
    watch.look()
    shutil.copytree(loras["wide"], tmp_path / "later" / "new")
    watch.look()
    watch.look()
    assert "new" in served.loop.engine.adapters.infos


def test_a_training_run_drops_its_adapter_into_a_running_server(base, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{i}", "completion": "x"} for i in range(8)])
    spec = {
        "base": str(base),
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "adapter": {"method": "lora", "r": 2, "target_modules": ["q_proj"]},
        "training": {"max_steps": 1, "report_to": []},
        "after": {"serve": str(tmp_path / "folder")},
        "device": "cpu",
    }
    with (
        Engine(str(base)) as engine,
        background_server(engine, adapter_folders=[tmp_path / "folder"], adapter_seconds=0.05) as url,
    ):
        toolkit.train(spec, tmp_path / "fresh", quiet=True)
        for _ in range(200):
            models = [m["id"] for m in httpx.get(f"{url}/v1/models", trust_env=False).json()["data"]]
            if "fresh" in models:
                break
            time.sleep(0.05)
        assert "fresh" in models
        body = {"model": "fresh", "prompt": "1", "max_tokens": 2}
        assert httpx.post(f"{url}/v1/completions", json=body, trust_env=False).status_code == 200
