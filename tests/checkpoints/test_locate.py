"""Paths first, then the hub's own cache; nothing here touches the network."""

from __future__ import annotations

import pytest
from huggingface_hub.utils import filter_repo_objects

from tests import tiny
from toolkit.checkpoints.locate import EMBEDDED, locate
from toolkit.checkpoints.reader import open_checkpoint
from toolkit.errors import MissingError


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A model in a hub cache, as `snapshot_download` lays it out."""
    commit = "a" * 40
    root = tmp_path / "hub"
    repo = root / "models--someone--small"
    tiny.save_model(tiny.llama(), repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(root))
    return repo / "snapshots" / commit


def test_hub_id_is_found_in_the_cache_offline(cached):
    assert locate("someone/small") == cached
    assert locate("someone/small@main") == cached
    with open_checkpoint("someone/small") as checkpoint:
        assert checkpoint.config["model_type"] == "llama"


def test_what_exists_on_disk_is_never_looked_up(cached, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "small").mkdir(parents=True)
    assert str(locate("someone/small")) == "someone/small"


def test_unknown_model_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingError, match="someone/unknown: no such folder, and the hub could not be reached"):
        locate("someone/unknown")
    with pytest.raises(MissingError, match="not of the form of a hub id"):
        locate("./runs/nothing")


FILES = {
    "weights": ["model-00001-of-00002.safetensors", "config.json", "tokenizer.model", "vocab.tiktoken"],
    "pickle": ["pytorch_model.bin"],
    "code": ["modeling_small.py"],
    "never": ["consolidated.safetensors", "consolidated-00001.safetensors", "original/params.json", "image.png"],
}


@pytest.mark.parametrize(
    ("options", "wanted"),
    [({}, {"weights"}), ({"code": True}, {"weights", "code"}), ({"allow_pickle": True}, {"weights", "pickle"})],
)
def test_what_is_fetched(options, wanted, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kw: given.update(kw) or str(tmp_path))
    assert locate("someone/small", **options) == tmp_path
    patterns = {key: given[key] for key in ("allow_patterns", "ignore_patterns")}
    fetched = set(filter_repo_objects([f for files in FILES.values() for f in files], **patterns))
    assert fetched == {file for kind in wanted for file in FILES[kind]}


def test_home_and_impossible_names(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert locate("~/model") == tmp_path / "model"
    for name in ("~nobody-of-this-name/model", "x" * 5000):
        with pytest.raises(MissingError, match="no such folder"):
            locate(name)


def test_embedded_base_has_a_name():
    assert locate(EMBEDDED).name == "base"
