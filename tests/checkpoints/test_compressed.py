"""The format of compressed deltas: every form read slice by slice, and folders that are not what they claim."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from toolkit.checkpoints.compressed import (
    CONFIG,
    CompressedDelta,
    compressed_writer,
    on_base,
    open_change,
    open_compressed,
    pack_bits,
    packed_bytes,
    part_name,
    unpack_bits,
)
from toolkit.checkpoints.deltas import AdaptedCheckpoint
from toolkit.checkpoints.dtypes import DTYPES
from toolkit.checkpoints.headers import TensorInfo
from toolkit.checkpoints.reader import open_checkpoint
from toolkit.errors import CheckpointError, MissingError, UnsupportedError

NAME = "model.layers.0.mlp.up_proj.weight"
SHAPE = (96, 48)
COUNT = 96 * 48
RNG = np.random.default_rng(0)
FLOATS = RNG.standard_normal(COUNT).astype(np.float32)
BITS = RNG.random(COUNT) < 0.3
LEVELS = RNG.integers(-127, 128, COUNT).astype(np.int8)
ROWS, COLS = (RNG.standard_normal(shape).astype(np.float32) for shape in ((96, 3), (3, 48)))
SCALES = np.abs(RNG.standard_normal(96)).astype(np.float32)
ONE_SCALE = np.array([0.3], np.float32)
PACKED = np.array([sum(int(b) << i for i, b in enumerate(byte)) for byte in BITS.reshape(-1, 8)], np.uint8)

Parts = dict[str, np.ndarray]
SIGNS = np.where(BITS, 1.0, -1.0).reshape(SHAPE)
PER_ROW = LEVELS.reshape(SHAPE) * SCALES[:, None].astype(np.float64)
FORMS: dict[str, tuple[Parts, np.ndarray]] = {
    "change": ({"change": FLOATS.reshape(SHAPE)}, FLOATS.reshape(SHAPE)),
    "mask": ({"vector": FLOATS.reshape(SHAPE), "mask": PACKED}, (FLOATS * BITS).reshape(SHAPE)),
    "signs, one scale": ({"signs": PACKED, "scale": ONE_SCALE}, SIGNS * 0.3),
    "signs, a scale per row": ({"signs": PACKED, "scale": SCALES}, SIGNS * SCALES[:, None]),
    "levels, one scale": ({"levels": LEVELS.reshape(SHAPE), "scale": ONE_SCALE}, LEVELS.reshape(SHAPE) * 0.3),
    "levels, a scale per row": ({"levels": LEVELS.reshape(SHAPE), "scale": SCALES}, PER_ROW),
    "pair": ({"rows": ROWS, "cols": COLS}, ROWS.astype(np.float64) @ COLS),
}
DTYPE_OF = {"float32": "F32", "float16": "F16", "uint8": "U8", "int8": "I8"}


def write(folder: Path, parts: Parts, *, name: str = NAME, task: str = "one", **options: object) -> Path:
    """Write parts of one tensor of one fine-tune; a vector is shared."""
    named = {part_name(name, part, None if part == "vector" else task): value for part, value in parts.items()}
    infos = [TensorInfo(stored, DTYPES[DTYPE_OF[v.dtype.name]], v.shape) for stored, v in named.items()]
    folder.mkdir(parents=True, exist_ok=True)
    given = {"kind": "test", "base_model": "the/base", "tasks": {task: "where/from"}} | options
    with compressed_writer(folder, infos, **given) as writer:
        for stored, value in named.items():
            writer.write(stored, 0, np.ascontiguousarray(value).reshape(-1).view(np.uint8))
    return folder


def read(delta: CompressedDelta, name: str, start: int, stop: int) -> np.ndarray:
    base, out = np.empty(stop - start, np.float32), np.full(stop - start, np.nan, np.float32)
    delta.base.read(name, start, stop, base)
    delta.read(name, start, stop, base, out)
    return out


@pytest.mark.system("tall_masks")
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 63, 1001])
def test_bits_are_packed_from_the_lowest(count):
    bits = np.random.default_rng(count).random(count) < 0.5
    packed = pack_bits(bits)
    assert len(packed) == packed_bytes(count) == -(-count // 8)
    assert [packed[i // 8] >> (i % 8) & 1 for i in range(count)] == bits.astype(int).tolist()
    for start, stop in ((0, count), (count // 3, count), (count // 2, count // 2 + count // 4)):
        part = packed[start // 8 : packed_bytes(stop)]
        assert unpack_bits(part, start, stop).tolist() == bits[start:stop].astype(int).tolist()


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_its_change_in_any_slice(form, base, tmp_path):
    parts, wanted = FORMS[form]
    folder = open_compressed(write(tmp_path / "out", parts))
    delta = CompressedDelta(open_checkpoint(base), folder)
    assert delta.touches(NAME)
    assert not delta.touches("model.norm.weight")
    assert delta.nbytes(NAME) == folder.nbytes == sum(value.nbytes for value in parts.values())
    for start, stop in ((0, COUNT), (48, 96), (0, 48), (13, 14), (7, 1000), (4607, 4608), (95, 4321)):
        got = read(delta, NAME, start, stop)
        np.testing.assert_allclose(got, wanted.reshape(-1)[start:stop], rtol=1e-6, atol=1e-6)
    assert not read(delta, "model.norm.weight", 0, 48).any()


def test_whole_tensors_are_the_fine_tunes_own(base, tmp_path):
    own = np.float16([*range(48)])
    write(tmp_path / "out", {"whole": own}, name="model.norm.weight")
    rebuilt = AdaptedCheckpoint(CompressedDelta(open_checkpoint(base), open_compressed(tmp_path / "out")))
    out = np.empty(48, np.float32)
    rebuilt.read("model.norm.weight", 0, 48, out)
    assert np.array_equal(out, own)
    with pytest.raises(UnsupportedError, match=r"model\.norm\.weight is computed, not stored"):
        rebuilt.read_raw("model.norm.weight")
    with open_checkpoint(base) as checkpoint:
        assert rebuilt.read_raw(NAME).tobytes() == checkpoint.read_raw(NAME).tobytes()


def test_what_kind_of_change_a_folder_holds(base, loras, tmp_path):
    write(tmp_path / "out", {"change": FLOATS.reshape(SHAPE)})
    with open_checkpoint(base) as checkpoint:
        own, wanted = np.empty(COUNT, np.float32), tiny.load_merged(base, loras["plain"]).state_dict()[NAME].reshape(-1)
        checkpoint.read(NAME, 0, COUNT, own)
        for source, expected in ((f"{tmp_path / 'out'}#one", own + FLOATS), (loras["plain"], wanted.numpy())):
            change = open_change(source)
            assert change is not None
            out = np.empty(COUNT, np.float32)
            on_base(checkpoint, change).read(NAME, 0, COUNT, out)
            np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert open_change(base) is None


def test_several_fine_tunes_share_a_vector_and_several_shards(base, tmp_path):
    masks = {task: RNG.random(COUNT) < 0.5 for task in ("one", "two")}
    infos = [TensorInfo(part_name(NAME, "vector"), DTYPES["F32"], SHAPE)]
    infos += [TensorInfo(part_name(NAME, "mask", task), DTYPES["U8"], (COUNT // 8,)) for task in masks]
    options = {"kind": "mask", "base_model": "b", "tasks": dict.fromkeys(masks, ""), "shard_bytes": 1000}
    with compressed_writer(tmp_path, infos, **options) as writer:
        writer.write(infos[0].name, 0, FLOATS.view(np.uint8))
        for task, mask in masks.items():
            writer.write(part_name(NAME, "mask", task), 0, np.packbits(mask, bitorder="little"))
    assert len(list(tmp_path.glob("delta-*-of-*.safetensors"))) == 3
    for task, mask in masks.items():
        delta = CompressedDelta(open_checkpoint(base), open_compressed(f"{tmp_path}#{task}"))
        assert delta.source == f"{tmp_path}#{task}"
        assert np.array_equal(read(delta, NAME, 0, COUNT), FLOATS * mask)
    folder = open_compressed(tmp_path)
    assert folder.describe() == "mask of one, two; tensors: 2 mask"
    with pytest.raises(CheckpointError, match=r"holds one, two; name one of them, as in .*#one"):
        CompressedDelta(open_checkpoint(base), folder)
    with pytest.raises(MissingError, match=r"no fine-tune 'three' \(known: one, two\)"):
        open_compressed(f"{tmp_path}#three")


BROKEN: dict[str, tuple[Parts, str]] = {
    "half of a form": ({"signs": PACKED}, "has the parts signs"),
    "a mask of nothing": ({"mask": PACKED}, "has the parts mask"),
    "two forms": ({"change": FLOATS.reshape(SHAPE), "rows": ROWS}, "has the parts change, rows"),
    "too few bits": ({"signs": PACKED[:-1], "scale": ONE_SCALE}, r"signs \[575\].* it is \[96, 48\]"),
    "wrong shape": ({"change": FLOATS.reshape(48, 96)}, r"change \[48, 96\], but in .* it is \[96, 48\]"),
    "scales per column": ({"signs": PACKED, "scale": SCALES[:48]}, r"scale \[48\]"),
    "pair that does not fit": ({"rows": ROWS, "cols": COLS[:2]}, r"rows \[96, 3\], cols \[2, 48\]"),
    "levels of the wrong kind": ({"levels": FLOATS.reshape(SHAPE), "scale": ONE_SCALE}, "stored as F32"),
    "signs of the wrong kind": ({"signs": PACKED.view(np.int8), "scale": ONE_SCALE}, "stored as I8"),
    "change of integers": ({"change": LEVELS.reshape(SHAPE)}, "stored as I8"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_parts_that_do_not_fit(case, base, tmp_path):
    parts, message = BROKEN[case]
    with pytest.raises(CheckpointError, match=message):
        CompressedDelta(open_checkpoint(base), open_compressed(write(tmp_path / "out", parts)))


def test_folders_that_are_not_what_they_claim(base, tmp_path):
    with pytest.raises(MissingError, match=r"no delta_config\.json in this folder"):
        open_compressed(tmp_path)
    out = write(tmp_path / "out", {"change": FLOATS.reshape(SHAPE)})
    config = json.loads((out / CONFIG).read_text())
    for change, kind, message in (
        ({"format": 2}, UnsupportedError, "format 2; this version reads up to 1"),
        ({"tasks": {}}, CheckpointError, "tasks must name at least one fine-tune"),
        ({"tasks": {"other": ""}}, CheckpointError, f"{NAME}:change:one: not a part of any fine-tune"),
    ):
        (out / CONFIG).write_text(json.dumps(config | change))
        with pytest.raises(kind, match=message):
            open_compressed(out)
    (out / CONFIG).write_text(json.dumps(config))
    shallow = tiny.save_model(tiny.llama(num_hidden_layers=1, intermediate_size=80), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"change \[96, 48\], but in .*other it is \[80, 48\]"):
        CompressedDelta(open_checkpoint(shallow), open_compressed(out))
    write(tmp_path / "deep", {"change": FLOATS.reshape(SHAPE)}, name="model.layers.7.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"changes model\.layers\.7.*, which .* does not have"):
        CompressedDelta(open_checkpoint(base), open_compressed(tmp_path / "deep"))
