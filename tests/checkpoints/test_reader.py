"""Reading agrees with the safetensors library and with transformers; every broken file is named with its fault."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests import tiny
from toolkit.checkpoints.deltas import chunks
from toolkit.checkpoints.headers import read_header
from toolkit.checkpoints.reader import INDEX, open_checkpoint, read_json
from toolkit.errors import CheckpointError, MissingError, UnsupportedError

ALL_DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
    torch.complex64,
]


@pytest.fixture
def mixed(tmp_path: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {}
    for dtype in ALL_DTYPES:
        values = torch.randn(5, 3, 2) * 20
        tensors[str(dtype)] = (values > 0) if dtype == torch.bool else values.abs().to(torch.float32).to(dtype)
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tensors


def test_every_dtype_reads_as_it_was_saved(mixed, tmp_path):
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == set(mixed)
        for name, expected in mixed.items():
            assert checkpoint.info(name).shape == tuple(expected.shape)
            got = checkpoint.tensor(name)
            assert got.dtype == expected.dtype
            assert got.shape == expected.shape
            assert torch.equal(got.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def test_slices_put_together_are_the_tensor(mixed, tmp_path):
    with open_checkpoint(tmp_path / "model.safetensors") as checkpoint:
        for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
            name = str(dtype)
            out = np.empty(30, np.float32)
            for start, stop in ((0, 7), (7, 8), (8, 30)):
                checkpoint.read(name, start, stop, out[start:stop])
            np.testing.assert_array_equal(out, mixed[name].float().flatten().numpy())


def test_chunks_cover_a_tensor_in_whole_rows():
    for shape in ((3,), (1000, 1000), (3, 200_000), (7, 5, 11), (), (0, 3), (70_000, 1)):
        ranges = list(chunks(shape))
        flat = [i for start, stop in ranges for i in (start, stop)]
        count = int(np.prod(shape))
        assert (flat[0], flat[-1]) == (0, count) if count else not ranges
        assert flat[1:-1:2] == flat[2::2]
        row = int(np.prod(shape[1:]))
        if len(shape) > 1 and row <= 65536:
            assert all(start % row == 0 for start, _ in ranges)


def test_sharded_folder_equals_its_model(tmp_path):
    model = tiny.llama(tie_word_embeddings=True)
    tiny.save_model(model, tmp_path, max_shard_size="50KB")
    assert (tmp_path / INDEX).is_file()
    state = model.state_dict()
    with open_checkpoint(tmp_path) as checkpoint:
        assert len({info.file for info in checkpoint.tensors.values()}) > 2
        assert "lm_head.weight" not in checkpoint.tensors
        assert checkpoint.has("lm_head.weight")
        for name in state:
            assert torch.equal(checkpoint.tensor(name), state[name])
        assert checkpoint.config["model_type"] == "llama"
        assert checkpoint.num_parameters == sum(p.numel() for p in model.parameters())


def test_model_in_memory_reads_like_its_folder(tmp_path):
    model = tiny.llama(tie_word_embeddings=True).to(torch.bfloat16)
    tiny.save_model(model, tmp_path)
    memory, folder = open_checkpoint(model), open_checkpoint(tmp_path)
    assert set(memory.tensors) == set(folder.tensors)
    for name in folder.tensors:
        assert memory.read_raw(name, 3, 17).tolist() == folder.read_raw(name, 3, 17).tolist()


def write(path: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BROKEN = {
    "three bytes": (b"abc", "truncated, or not a safetensors file"),
    "header longer than the file": (struct.pack("<Q", 1 << 40) + b"{}", "truncated, or not a safetensors file"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_file_that_is_no_container(case, tmp_path):
    content, message = BROKEN[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


LYING = {
    "not json": (b"{no", b"", "not valid JSON"),
    "not an object": ([1], b"", "not a JSON object"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4), "lacks dtype, shape or data_offsets"),
    "unknown dtype": ({"a": entry([1], [0, 4], "F33")}, bytes(4), "unknown dtype 'F33'"),
    "negative size": ({"a": entry([-1], [0, 4])}, bytes(4), "not a list of sizes"),
    "size that is a bool": ({"a": entry([True], [0, 4])}, bytes(4), "not a list of sizes"),
    "one offset": ({"a": entry([1], [0])}, bytes(4), "not two positions"),
    "wrong length": ({"a": entry([2], [0, 4])}, bytes(4), "takes 8 bytes, the header gives it 4"),
    "gap": ({"a": entry([1], [0, 4]), "b": entry([1], [8, 12])}, bytes(12), "'b' leaves a gap"),
    "overlap": ({"a": entry([2], [0, 8]), "b": entry([2], [4, 12])}, bytes(12), "'b' overlaps"),
    "truncated data": ({"a": entry([4], [0, 16])}, bytes(9), "truncated: the header promises"),
    "trailing data": ({"a": entry([1], [0, 4])}, bytes(9), "5 bytes after the last tensor"),
    "deeply nested": (b'{"a":' + b"[" * 200_000, b"", "not valid JSON"),
    "a number of 5000 digits": (b'{"a":' + b"1" * 5000 + b"}", b"", "not valid JSON"),
    "a size of 4000 digits": (
        b'{"a":{"dtype":"U8","shape":[%s,%s],"data_offsets":[0,1]}}' % (b"1" * 4000, b"1" * 4000),
        bytes(1),
        "not a list of sizes",
    ),
    "more elements than can be": ({"a": entry([1 << 40, 1 << 40], [0, 1], "U8")}, bytes(1), "more elements than any"),
    "dtype that is a list": ({"a": entry([1], [0, 4], ["F32"])}, bytes(4), r"unknown dtype \['F32'\]"),  # pyright: ignore[reportArgumentType]
    "name twice": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        bytes(1),
        "names 'a' twice",
    ),
}


@pytest.mark.parametrize("case", LYING)
def test_header_that_lies(case, tmp_path):
    header, data, message = LYING[case]
    write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "model.safetensors" in str(caught.value)


def test_folder_in_the_place_of_a_file(tmp_path, base):
    (tmp_path / "a" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read \(Is a directory\)"):
        open_checkpoint(tmp_path / "a")
    (tmp_path / "b" / "model.safetensors.index.json").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"cannot be read \(Is a directory\)"):
        read_json(tmp_path / "b" / "model.safetensors.index.json")


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a": ' + "1" * 5000 + "}", '{"a": '])
def test_json_that_cannot_be_parsed(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        read_json(tmp_path / "config.json")


def test_any_cut_of_a_real_file_is_an_error(tmp_path, base):
    whole = (base / "model.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    for length in [0, 1, 7, 8, 9, 100, 1000, 5000, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_header(path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny.save_model(tiny.llama(), tmp_path / "sharded", max_shard_size="50KB")


def test_missing_shard(sharded):
    victim = sorted(sharded.glob("model-*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=f"1 of .* shards are missing: {victim.name}"):
        open_checkpoint(sharded)


def test_tensor_that_the_index_promises_is_missing(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.ghost.weight"] = next(iter(index["weight_map"].values()))
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"'model\.ghost\.weight' is not in model-"):
        open_checkpoint(sharded)


def test_tensor_in_two_shards(sharded):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=r"tensor .* is in .* and in"):
        open_checkpoint(sharded)


def test_index_cannot_point_outside_its_folder(sharded):
    index = json.loads((sharded / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../elsewhere.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is not a file name"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}'])
def test_broken_index(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(CheckpointError):
        open_checkpoint(sharded)


def test_broken_config(sharded):
    (sharded / "config.json").write_text("{,")
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        open_checkpoint(sharded)


def test_nothing_there(tmp_path):
    with pytest.raises(MissingError, match="no such folder"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(MissingError, match="no safetensors file"):
        open_checkpoint(tmp_path)
    with pytest.raises(UnsupportedError, match="not int"):
        open_checkpoint(3)


def test_pickle_is_refused_unless_allowed(tmp_path):
    state = {"a": torch.randn(3, 2), "b": torch.randn(2).to(torch.bfloat16)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        open_checkpoint(tmp_path)
    checkpoint = open_checkpoint(tmp_path, allow_pickle=True)
    assert all(torch.equal(checkpoint.tensor(name), value) for name, value in state.items())


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("owned"),))


def test_pickle_that_runs_code_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Malicious()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read as plain weights"):
        open_checkpoint(tmp_path, allow_pickle=True)
    assert not (tmp_path / "owned").exists()


def test_file_that_shrinks_while_it_is_read(tmp_path):
    save_file({"a": torch.zeros(1000)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.truncate(200)
        with pytest.raises(CheckpointError, match="became shorter"):
            checkpoint.read_raw("a")
