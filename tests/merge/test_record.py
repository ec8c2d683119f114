"""What a merge says about itself, and checking it again from that."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
import yaml

from tests import tiny
from toolkit.cli import main
from toolkit.errors import CheckpointError, MissingError, UnsupportedError
from toolkit.merge.plan import make_plan
from toolkit.merge.run import merge
from toolkit.merge.verify import verify


@pytest.fixture
def family(tmp_path) -> dict[str, str]:
    base = tiny.llama().to(torch.bfloat16)
    folders = {"base": str(tiny.save_model(base, tmp_path / "base"))}
    for i in range(2):
        folders[f"tuned{i}"] = str(tiny.save_model(tiny.tuned(base, i), tmp_path / f"tuned{i}"))
    return folders


def spec_of(family: dict[str, str], method: str, **changes: object) -> dict[str, object]:
    models = [{"model": family[f"tuned{i}"]} for i in range(2)]
    return {"merge_method": method, "base_model": family["base"], "models": models, **changes}


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "iso_c", "model_stock"])
def test_what_was_written_is_found_again(method, family, tmp_path):
    merge(spec_of(family, method), tmp_path / "out", quiet=True)
    assert verify(tmp_path / "out", quiet=True).numbers["equal"]


def test_a_changed_output_is_found_and_named(family, tmp_path, capsys):
    merge(spec_of(family, "ties"), tmp_path / "out", quiet=True)
    flip(tmp_path / "out" / "model.safetensors", -1)  # the last of the tensors, of one slice like all of them
    result = verify(tmp_path / "out", quiet=True)
    assert not result.numbers["equal"]
    assert len(result.numbers["faults"]) == 1
    assert main(["merge", "--verify", str(tmp_path / "out"), "-q", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["faults"] == result.numbers["faults"]


def test_another_layout_is_found(family, tmp_path):
    merge(spec_of(family, "ties"), tmp_path / "out", quiet=True)
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    record["spec"]["dtype"] = "float32"
    (tmp_path / "out" / "merge.json").write_text(json.dumps(record))
    result = verify(tmp_path / "out", quiet=True)
    assert "is BF16" in result.numbers["faults"][0]


@pytest.mark.parametrize("hashes", ["sample", "full"])
def test_a_changed_input_is_named(hashes, family, tmp_path):
    merge(spec_of(family, "ties"), tmp_path / "out", hashes=hashes, quiet=True)
    flip(Path(family["tuned1"]) / "model.safetensors", -1)
    with pytest.raises(CheckpointError, match=r"tuned1/model\.safetensors: is not the file that was merged"):
        verify(tmp_path / "out", quiet=True)
    (Path(family["tuned1"]) / "model.safetensors").unlink()
    with pytest.raises(MissingError, match="was merged and is not there now"):
        verify(tmp_path / "out", quiet=True)


def test_record_and_card_hold_spec_hashes_and_versions(family, tmp_path):
    spec = spec_of(family, "dare_ties", seed=3)
    merge(spec, tmp_path / "out", hashes="full", quiet=True)
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["spec"] == spec
    assert {entry["file"] for entry in record["inputs"]} == {f"{f}/model.safetensors" for f in family.values()}
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("```yaml")[1].split("```")[0]) == spec
    for entry in record["inputs"]:
        assert entry["sha256"] == hashlib.sha256(Path(entry["file"]).read_bytes()).hexdigest()
        assert entry["sha256"] in card
    assert record["versions"].keys() >= {"composition-toolkit", "numpy"}


@pytest.mark.parametrize(
    "output",
    [{"type": "adapter"}, {"type": "adapter", "rank": 2}, {"type": "compressed", "as": "svd", "rank": 2}],
    ids=["sum", "svd", "compressed"],
)
def test_small_outputs_have_a_record_and_are_verified_whole(output, base, loras, tmp_path):
    models = [{"model": str(loras[name]), "parameters": {"weight": 0.5}} for name in ("plain", "dora")]
    spec = {"merge_method": "task_arithmetic", "base_model": str(base), "models": models, "output": output}
    out = merge(spec, tmp_path / "out", hashes="full", quiet=True).path
    record = json.loads((out / "merge.json").read_text())
    assert record["spec"] == spec
    weights = {
        str(base / "model.safetensors"),
        *(str(loras[n] / "adapter_model.safetensors") for n in ("plain", "dora")),
    }
    card = (out / "README.md").read_text()
    assert {entry["file"] for entry in record["inputs"]} == weights
    assert all(entry["sha256"] in card for entry in record["inputs"])
    assert verify(out, quiet=True).numbers["equal"]
    (file,) = out.glob("*.safetensors")
    flip(file, -1)
    result = verify(out, quiet=True)
    assert not result.numbers["equal"]
    assert len(result.numbers["faults"]) == 1
    merge(spec, tmp_path / "bare", card=False, quiet=True)
    assert not (tmp_path / "bare" / "README.md").exists()


def test_donors_are_said(family, tmp_path):
    """Config and tokenizer are the base's, or else the first model's; a template may be another's."""
    for spec, donor in ((spec_of(family, "ties"), "base"), (spec_of(family, "linear", base_model=None), "tuned0")):
        if donor == "tuned0":
            spec["parameters"] = {"weight": 1}
        result = merge(spec, tmp_path / f"on_{donor}", quiet=True)
        wanted = dict.fromkeys(("config", "tokenizer", "chat template"), family[donor])
        assert result.numbers["donors"] == wanted
        assert json.loads((result.path / "merge.json").read_text())["donors"] == wanted
        line = f"config, tokenizer, chat template of {family[donor]}"
        assert f"Taken over: {line}." in (result.path / "README.md").read_text()
        assert make_plan(spec).table().title.startswith(f"Plan; {line}; ")
    for folder in ("tuned0", "tuned1"):
        (Path(family[folder]) / "chat_template.jinja").write_text("{{ messages[0].content }}")
    plan = make_plan(spec_of(family, "ties", chat_template="auto", tokenizer={"source": family["tuned1"]}))
    assert plan.donors == {"config": family["base"], "tokenizer": family["tuned1"], "chat template": family["tuned0"]}
    title = f"Plan; config of {family['base']}; tokenizer of {family['tuned1']}; chat template of {family['tuned0']}; "
    assert plan.table().title.startswith(title)


def test_files_of_the_hub_are_known_by_their_name(family, tmp_path):
    """The hub's cache keeps weights under their SHA-256, and links to them."""
    file = Path(family["tuned0"]) / "model.safetensors"
    blob = tmp_path / hashlib.sha256(file.read_bytes()).hexdigest()
    file.rename(blob)
    file.symlink_to(blob)
    merge(spec_of(family, "ties"), tmp_path / "out", quiet=True)
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert {e["file"]: e.get("sha256") for e in record["inputs"]}[str(file)] == blob.name
    assert verify(tmp_path / "out", quiet=True).numbers["equal"]


def test_what_cannot_be_verified_is_said(family, tmp_path):
    with pytest.raises(MissingError, match=r"no merge\.json"):
        verify(family["base"])
    model = tiny.llama()
    merge({"merge_method": "passthrough", "models": [{"model": model}]}, tmp_path / "out", quiet=True)
    with pytest.raises(UnsupportedError, match="models in memory were merged"):
        verify(tmp_path / "out")


def test_options_of_mergekit(family, tmp_path, capsys):
    """Those that do something do it; the others change nothing."""
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec_of(family, "dare_linear", parameters={"density": 0.5})))
    plain = ["merge", str(tmp_path / "spec.yaml"), "-q"]

    def run(name: str, *options: str) -> bytes:
        assert main([*plain, str(tmp_path / name), *options]) == 0
        capsys.readouterr()
        return (tmp_path / name / "model.safetensors").read_bytes()

    default = run("default")
    assert run("seeded", "--random-seed", "0") == default
    assert run("other", "--random-seed", "1") != default
    nothing = ["--lazy-unpickle", "--low-cpu-memory", "--no-clone-tensors", "--allow-crimes", "--write-threads", "2"]
    assert run("same", *nothing, "--num-threads", "2", "--no-write-model-card", "--no-copy-tokenizer") == default
    assert not (tmp_path / "same" / "README.md").exists()
    assert not (tmp_path / "same" / "tokenizer.json").exists()
    assert (tmp_path / "same" / "config.json").exists()
    assert main([*plain, str(tmp_path / "shards"), "--out-shard-size", "60KB"]) == 0
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
