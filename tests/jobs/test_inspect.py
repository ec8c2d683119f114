"""Inspecting deltas and compressed folders: what is opened, measured, shown and drawn."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from tests import tiny
from toolkit.checkpoints.reader import Checkpoint
from toolkit.cli import main
from toolkit.errors import MissingError, OutputError, SpecError, UnsupportedError
from toolkit.jobs.inspect import inspect
from toolkit.jobs.plots import draw
from toolkit.merge.conflicts import Comparison
from toolkit.merge.extract import extract
from toolkit.tables import human_bytes


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory) -> list[Path]:
    """Two full fine-tunes of the base."""
    root, model = tmp_path_factory.mktemp("tuned"), tiny.llama()
    return [tiny.save_model(tiny.tuned(model, i), root / f"tuned{i}") for i in range(2)]


@pytest.fixture(scope="module")
def masks(base, tuned, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compressed") / "masks"
    extract(base, tuned, folder, kind="mask", quiet=True)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A model that the base's fine-tunes do not fit."""
    return tiny.save_model(tiny.llama(hidden_size=32), tmp_path_factory.mktemp("other") / "other")


@pytest.fixture(scope="module")
def found(base, tuned, loras) -> Comparison:
    comparison = inspect(*tuned, loras["few"], base=base, quiet=True).comparison
    assert comparison is not None
    return comparison


def vector(state: dict[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([value.double().numpy().reshape(-1) for _, value in sorted(state.items())])


def test_headers_alone_are_read_unless_deltas_are_asked_for(base, tuned, masks, loras, monkeypatch):
    def read(*args: object) -> None:
        raise AssertionError("no weights are to be read")

    monkeypatch.setattr(Checkpoint, "read", read)
    result = inspect(base, *tuned, masks, loras["plain"])
    assert result.numbers["compatible"]
    assert "deltas" not in result.numbers
    assert result.comparison is None
    with pytest.raises(UnsupportedError, match="no deltas were measured"):
        result.figure()
    with pytest.raises(AssertionError, match="no weights"):
        inspect(base, *tuned, deltas=True, quiet=True)


def test_numbers_of_deltas(base, tuned, loras):
    result = inspect(base, *tuned, loras["plain"], deltas=True, ranks=[2, 4], quiet=True)
    measured = json.loads(json.dumps(result.numbers, allow_nan=False))["deltas"]
    sources = [str(path) for path in (*tuned, loras["plain"])]
    assert measured["base"] == str(base)
    assert measured["models"] == sources
    own = vector(tiny.llama().state_dict())
    states = [tiny.tuned(tiny.llama(), i).state_dict() for i in range(2)]
    x = [vector(state) - own for state in (*states, tiny.load_merged(base, loras["plain"]).state_dict())]
    total = measured["total"]
    for i, source in enumerate(sources):
        assert total["norm"][source] == pytest.approx(np.linalg.norm(x[i]), rel=1e-5)
        assert total["relative_norm"][source] == pytest.approx(np.linalg.norm(x[i]) / np.linalg.norm(own), rel=1e-5)
    assert total["cosine"][0][1] == pytest.approx(x[0] @ x[1] / np.linalg.norm(x[0]) / np.linalg.norm(x[1]), abs=1e-6)
    assert total["conflicts"][0][1] == np.mean(x[0] * x[1] < 0)
    assert total["overlap"][0][1] == 1 == total["changed"][sources[0]]
    assert total["elements"] == len(own)
    assert list(total["energy"][sources[2]]) == ["2", "4"]
    assert total["energy"][sources[2]]["4"] == pytest.approx(1)
    assert list(measured["layers"]) == ["embeddings", *(f"model.layers.{i}" for i in range(3)), "norm", "head"]
    assert measured["layers"]["norm"]["energy"][sources[0]] == {"2": None, "4": None}
    tensor = measured["tensors"]["model.layers.0.mlp.down_proj.weight"]
    assert tensor["shape"] == [48, 96]
    assert set(tensor) == set(total) | {"shape"}
    assert measured["not_finite"] == []


def test_base_is_the_first_or_the_named_or_the_adapters_own(base, tuned, loras):
    wanted = inspect(base, loras["few"], loras["wide"], deltas=True, quiet=True).numbers["deltas"]
    assert inspect(loras["few"], loras["wide"], deltas=True, quiet=True).numbers["deltas"] == wanted
    assert inspect(loras["few"], loras["wide"], base=str(base), quiet=True).numbers["deltas"] == wanted
    named = inspect(base, loras["few"], loras["wide"], base=str(base), quiet=True)
    assert named.numbers["deltas"] == wanted, "the base among the models takes no part"
    assert len(named.numbers["sources"]) == 3
    model, delta = tiny.llama(), tiny.tuned(tiny.llama(), 0)
    in_memory = inspect(delta, base=model, energy=False, quiet=True).numbers["deltas"]["total"]
    of_files = inspect(tuned[0], base=base, energy=False, quiet=True).numbers["deltas"]["total"]
    assert "energy" not in in_memory
    assert "cosine" not in in_memory, "one delta has none to be compared with"
    assert list(in_memory["norm"].values()) == pytest.approx(list(of_files["norm"].values()), rel=1e-12)


def test_tables_of_deltas(base, tuned, loras, found):
    tables = inspect(*tuned, loras["few"], base=base, quiet=True).tables[-3:]
    models, pairs, layers = (table.to_dicts() for table in tables)
    assert [row["model"] for row in models] == [*map(str, tuned), str(loras["few"])]
    assert models[0]["norm"] == found.total.norms[0]
    assert models[2]["energy, top 8"] == found.total.energy[2, 1]
    shown = [row["sign conflicts"] for row in pairs[:3]]
    assert shown == sorted((found.total.conflicts[i, j] for i, j in ((0, 1), (0, 2), (1, 2))), reverse=True)
    assert pairs[3]["models"] == "all together"
    assert pairs[3]["sign conflicts"] == found.total.clashes
    assert [row["layer"] for row in layers] == list(found.layers)
    second, sums = layers[2], found.layers["model.layers.1"]
    assert second["norm, tuned1"] == sums.norms[1]
    assert second["cosine"] == sums.mean_cosine()
    assert second["energy, top 16"] == sums.mean_energy()[2]
    assert layers[-2]["energy, top 1"] is None, "norms are no matrices"


def test_many_models_have_short_tables(base, loras):
    result = inspect(*loras.values(), base=base, energy=False, quiet=True)
    assert result.comparison is not None
    pairs, layers = result.tables[-2:]
    assert len(pairs.rows) == 11
    assert "10 of 15" in pairs.title
    assert layers.columns == ["layer", "norm, mean", "norm, largest", "relative norm", "cosine", "sign conflicts"]
    norms = result.comparison.layers["model.layers.0"].norms
    assert layers.to_dicts()[1]["norm, mean"] == pytest.approx(norms.mean())
    assert layers.to_dicts()[1]["norm, largest"] == norms.max()


def test_compressed_folder_is_described(base, masks, tuned):
    result = inspect(base, masks)
    assert result.numbers["compatible"]
    numbers = result.numbers["sources"][1]
    stored = load_file(masks / "delta.safetensors")
    assert numbers["kind"] == "compressed deltas"
    assert numbers["base_model"] == str(base)
    assert numbers["fine_tunes"] == {"tuned0": str(tuned[0]), "tuned1": str(tuned[1])}
    assert numbers["chosen"] is None
    assert numbers["bytes"] == sum(value.nbytes for value in stored.values())
    counts = {"mask": sum(":mask:tuned0" in name for name in stored)}
    counts["whole"] = sum(":whole:tuned0" in name for name in stored)
    assert numbers["forms"] == {"tuned0": counts, "tuned1": counts}
    rows = result.tables[1].to_dicts()
    assert {(row["fine-tune"], row["form"]): row["tensors"] for row in rows} == {
        **{(task, form): count for task in ("tuned0", "tuned1") for form, count in counts.items()},
        ("all", "vector"): counts["mask"],
    }
    for row in rows:
        end = ":vector" if row["form"] == "vector" else f":{row['form']}:{row['fine-tune']}"
        assert row["size"] == human_bytes(sum(value.nbytes for name, value in stored.items() if name.endswith(end)))
    assert inspect(f"{masks}#tuned1").numbers["sources"][0]["chosen"] == "tuned1"
    with pytest.raises(MissingError, match=r"no fine-tune 'x' \(known: tuned0, tuned1\)"):
        inspect(f"{masks}#x")


def test_every_fine_tune_of_a_compressed_folder_is_measured(base, masks, tuned):
    numbers = inspect(masks, tuned[0], base=base, energy=False, quiet=True).numbers["deltas"]
    assert numbers["models"] == [f"{masks}#tuned0", f"{masks}#tuned1", str(tuned[0])]
    cosine = np.array(numbers["total"]["cosine"])
    assert cosine[0, 2] > 0.7 > 0.3 > abs(cosine[1, 2])
    one = inspect(f"{masks}#tuned1", base=base, energy=False, quiet=True).numbers["deltas"]
    assert one["models"] == [f"{masks}#tuned1"]
    assert one["total"]["norm"][f"{masks}#tuned1"] == numbers["total"]["norm"][f"{masks}#tuned1"]


def test_compressed_folder_that_does_not_fit(base, masks, other, loras, tmp_path):
    for pair in ((other, masks), (masks, other)):
        result = inspect(*pair)
        assert not result.numbers["compatible"]
        assert f"but in {other} it is" in result.numbers["faults"][0]
    assert inspect(masks, loras["plain"]).numbers["compatible"]
    elsewhere = tiny.save_lora(other, tmp_path / "lora")
    assert f"names the base {other}, {masks} names {base}" in inspect(masks, elsewhere).numbers["faults"][0]


def test_what_does_not_fit_is_told_and_not_measured(base, tuned, other, tmp_path):
    result = inspect(base, tuned[0], other, plot=tmp_path / "plot.png", quiet=True)
    assert not result.numbers["compatible"]
    assert result.numbers["deltas"]["models"] == [str(tuned[0])]
    assert (tmp_path / "plot.png").is_file()
    nothing = inspect(base, other, plot=tmp_path / "other.png", quiet=True)
    assert "deltas" not in nothing.numbers
    assert not (tmp_path / "other.png").exists()


def test_other_tokens_are_told_although_all_shapes_agree(base, tuned, tmp_path):
    folder = shutil.copytree(tuned[0], tmp_path / "shuffled")
    data = json.loads((folder / "tokenizer.json").read_text())
    known = data["model"]["vocab"]
    known.update(zip(list(known)[:50], list(known.values())[49::-1], strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(data))
    result = inspect(base, tuned[0], folder)
    count = len(known) + len(data["added_tokens"])
    assert result.numbers["faults"] == [f"{folder}: 50 of {count} tokens have ids that mean other tokens in {base}"]


def test_nan_and_infinity_are_named(base, tmp_path):
    model = tiny.tuned(tiny.llama(), 0)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, :3] = float("nan")
    folder = tiny.save_model(model, tmp_path / "broken")
    result = inspect(folder, base=base, quiet=True)
    name = "model.layers.1.mlp.up_proj.weight"
    assert result.numbers["deltas"]["not_finite"] == [{"model": str(folder), "tensor": name, "elements": 3}]
    assert result.tables[-1].to_dicts() == [{"model": str(folder), "tensor": name, "elements": 3}]
    assert json.dumps(result.numbers, allow_nan=False)


def test_picture_holds_what_was_measured(found):
    figure = draw(found)
    panels = {axes.get_title().split(" (")[0]: axes for axes in figure.axes}
    titles = ["Norm of each delta", "Cosine between deltas", "Sign conflicts", "Energy in the top ranks"]
    norms, cosines, conflicts, energy = (panels[title] for title in titles)
    layers = list(found.layers.values())
    for i, line in enumerate(norms.lines):
        assert line.get_ydata().tolist() == [sums.relative_norms[i] for sums in layers]
    assert [text.get_text() for text in norms.get_legend().get_texts()] == ["tuned0", "tuned1", "few"]
    assert np.array_equal(cosines.images[0].get_array(), found.total.cosines)
    assert cosines.images[0].get_clim() == (-1, 1)
    assert [text.get_text() for text in cosines.texts[:3]] == [
        f"{c + 0.0:.2f}" for c in found.total.cosines[0].round(2)
    ]
    assert conflicts.lines[0].get_ydata().tolist() == [sums.clashes for sums in layers]
    shaded = conflicts.collections[0].get_paths()[0].vertices[:, 1]
    pairs = [sums.conflicts[p] for sums in layers for p in ((0, 1), (0, 2), (1, 2)) if sums.both[p]]
    assert (shaded.min(), shaded.max()) == (min(pairs), max(pairs))
    for at, line in enumerate(energy.lines):
        assert np.array_equal(line.get_ydata(), [sums.mean_energy()[at] for sums in layers], equal_nan=True)
    for axes in (norms, conflicts, energy):
        ticks = [text.get_text() for text in axes.get_xticklabels()]
        assert ticks == ["embeddings", "0", "1", "2", "norm", "head"]
        assert axes.get_title()
        assert axes.get_ylabel()
    assert len({line.get_color() for line in norms.lines}) == 3 == len({line.get_marker() for line in norms.lines})


def test_panels_of_one_model_and_without_energy(base, tuned, loras):
    one = inspect(tuned[0], base=base, quiet=True).figure()
    assert [axes.get_title() for axes in one.axes] == ["Norm of each delta", "Energy in the top ranks"]
    several = inspect(*loras.values(), base=base, energy=False, quiet=True).figure()
    titles = [axes.get_title() for axes in several.axes if axes.get_title()]
    assert [title.split(" (")[0] for title in titles] == [
        "Norm of each delta",
        "Cosine between deltas",
        "Sign conflicts",
    ]


def test_plots_are_pictures(base, loras, tmp_path):
    for ending in ("png", "svg", "pdf"):
        inspect(base, loras["few"], loras["plain"], plot=tmp_path / f"plot.{ending}", quiet=True)
    with Image.open(tmp_path / "plot.png") as image:
        image.load()
        assert min(image.size) > 600
    assert ElementTree.parse(tmp_path / "plot.svg").getroot().tag.endswith("svg")
    assert (tmp_path / "plot.pdf").read_bytes().startswith(b"%PDF-")
    assert len(list(tmp_path.iterdir())) == 3, "nothing else is left"


def test_plot_is_refused_before_anything_is_measured(base, tuned, tmp_path, monkeypatch):
    def compare(*args: object, **options: object) -> None:
        raise AssertionError("nothing is to be measured")

    monkeypatch.setattr("toolkit.jobs.inspect.compare", compare)
    (tmp_path / "plot.png").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    for name, error, message in (
        ("plot.png", OutputError, "exists already; name another file, or pass --overwrite"),
        ("folder.png", OutputError, "is a folder"),
        ("none/plot.png", OutputError, "there is no folder"),
        ("plot.jpg", UnsupportedError, r"a plot is one of \.png, \.svg, \.pdf"),
    ):
        with pytest.raises(error, match=message):
            inspect(base, *tuned, plot=tmp_path / name)
    monkeypatch.undo()
    inspect(base, tuned[0], energy=False, plot=tmp_path / "plot.png", overwrite=True, quiet=True)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(base, tuned, tmp_path, monkeypatch):
    result = inspect(base, tuned[0], deltas=True, energy=False, quiet=True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    wanted = r"plots need matplotlib: pip install 'composition-toolkit\[plot\]'"
    with pytest.raises(UnsupportedError, match=wanted):
        inspect(base, tuned[0], plot=tmp_path / "plot.png")
    with pytest.raises(UnsupportedError, match=wanted):
        result.figure()


def test_matplotlib_is_imported_only_to_draw():
    code = "import sys, toolkit.jobs.plots; import toolkit.jobs.inspect; print('matplotlib' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ranks": [1, 0]}, SpecError, "expected whole numbers above 0, such as 1, 8 and 16, got 0"),
        ({"ranks": []}, SpecError, "got none"),
        ({"ranks": [True]}, SpecError, "got True"),
        ({"ranks": [8], "energy": False}, SpecError, "are of the energy, which is not to be measured"),
        ({"base": "{lora}"}, UnsupportedError, "few: no full model, which deltas are taken from"),
        ({"base": "{base}"}, UnsupportedError, "besides the base; name at least one"),
    ],
)
def test_bad_options(options, error, message, base, loras):
    named = {"{lora}": loras["few"], "{base}": base}
    options = {key: named.get(value, value) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(error, match=message):
        inspect(base, quiet=True, **options)


def test_command(base, tuned, loras, other, tmp_path, capsys):
    arguments = ["inspect", *map(str, tuned), "--base", str(base), "--ranks", "1,2", "--quiet"]
    assert main([*arguments, "--json", "--plot", str(tmp_path / "plot.svg")]) == 0
    out, err = capsys.readouterr()
    assert list(json.loads(out)["deltas"]["total"]["energy"][str(tuned[0])]) == ["1", "2"]
    assert not err
    assert (tmp_path / "plot.svg").is_file()
    assert main(["inspect", str(base), str(loras["few"]), "--deltas", "--no-energy"]) == 0
    out, err = capsys.readouterr()
    assert "Deltas from" in out
    assert "energy" not in out
    assert "comparing deltas" in err
    assert main(["inspect", str(base), str(other), "--deltas", "-q"]) == 1
    assert main(["inspect", str(base), "--ranks", "1,x"]) == 2
    assert "--ranks '1,x': expected numbers separated by commas, such as 1,8,16" in capsys.readouterr().err
