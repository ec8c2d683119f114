"""A merge split over machines is the merge in one go, to the last byte of every file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.merge.test_run import content
from toolkit.cli import main
from toolkit.errors import MissingError, OutputError, SpecError
from toolkit.merge.parts import Part, join
from toolkit.merge.plan import make_plan
from toolkit.merge.run import merge
from toolkit.merge.verify import verify

SIZE = 30_000
"""Bytes of an output file, of which there are then several."""


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Path:
    root, base = tmp_path_factory.mktemp("family"), tiny.llama()
    tiny.save_model(base, root / "base")
    for i in range(2):
        tiny.save_model(tiny.tuned(base, i), root / f"tuned{i}")
    return root


def spec_of(family: Path, method: str = "ties", **parameters) -> dict:
    given = {} if method == "model_stock" else {"weight": 0.5}
    return {
        "merge_method": method,
        "base_model": str(family / "base"),
        "models": [{"model": str(family / f"tuned{i}")} for i in range(2)],
        "parameters": given | ({"density": 0.5} if method == "ties" else {}) | parameters,
    }


@pytest.mark.parametrize("method", ["ties", "model_stock", "della"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_joined_parts_are_the_merge_in_one_go(method, count, family, tmp_path):
    spec = spec_of(family, method)
    merge(spec, tmp_path / "whole", shard_bytes=SIZE, quiet=True)
    for index in range(count, 0, -1):
        result = merge(spec, tmp_path / "joined", shard=f"{index}/{count}", shard_bytes=SIZE, quiet=True)
        assert result.path == tmp_path / f"joined.part-{index}-of-{count}"
    assert not (tmp_path / "joined").exists()
    result = join(spec, tmp_path / "joined", shard_bytes=SIZE)
    assert content(tmp_path / "joined") == content(tmp_path / "whole")
    assert len(list((tmp_path / "joined").glob("*.safetensors"))) > 3
    assert result.numbers["tensors"] == len(tiny.llama().state_dict())
    assert not list(tmp_path.glob("*.part-*"))
    assert verify(tmp_path / "joined", quiet=True).numbers["equal"]


def test_parts_are_balanced_and_hold_every_file_once(family):
    plan = make_plan(spec_of(family), shard_bytes=SIZE)
    plan.inputs.close()
    parts = [Part(i, 3).shards(plan) for i in (1, 2, 3)]
    assert sorted(name for part in parts for name in part) == sorted(plan.shards)
    loads = [sum(t.nbytes for shard in part.values() for t in shard) for part in parts]
    assert max(loads) - min(loads) <= max(sum(t.nbytes for t in shard) for shard in plan.shards.values())


def test_what_does_not_belong_together_is_refused(family, tmp_path):
    spec, out = spec_of(family), tmp_path / "out"
    with pytest.raises(MissingError, match=r"out.part-1-of-N: no such folder; run toolkit merge SPEC .* --shard i/N"):
        join(spec, out, shard_bytes=SIZE)
    merge(spec, out, shard="1/2", shard_bytes=SIZE, quiet=True)
    with pytest.raises(MissingError, match="without its shares 2/2"):
        join(spec, out, shard_bytes=SIZE)
    merge(spec_of(family, density=0.4), out, shard="2/2", shard_bytes=SIZE, quiet=True)
    with pytest.raises(OutputError, match=r"part-2-of-2: is of another merge \(spec differ\)"):
        join(spec, out, shard_bytes=SIZE)
    merge(spec, out, shard="2/2", shard_bytes=SIZE, overwrite=True, quiet=True)
    with pytest.raises(OutputError, match=r"is of another merge \(files differ\)"):
        join(spec, out, shard_bytes=2 * SIZE)
    part = tmp_path / "out.part-2-of-2"
    broken = sorted(part.glob("*.safetensors"))[0]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(OutputError, match=f"{broken.name}: is not as it was written"):
        join(spec, out, shard_bytes=SIZE)
    assert not out.exists()
    broken.write_bytes(whole)
    merge(spec, out, shard="1/3", shard_bytes=SIZE, quiet=True)
    with pytest.raises(OutputError, match="there are shares of 2 and 3"):
        join(spec, out, shard_bytes=SIZE)


def test_other_inputs_of_the_same_names_are_refused(family, tmp_path):
    """On another machine a model of the same name may be another one."""
    place = tmp_path / "models"
    subprocess.run(["cp", "-r", family, place], check=True)
    spec, out = spec_of(place), tmp_path / "out"
    merge(spec, out, shard="1/2", shard_bytes=SIZE, quiet=True)
    weights = load_file(place / "tuned0" / "model.safetensors")
    first = next(iter(weights))
    save_file(weights | {first: weights[first] + 1}, place / "tuned0" / "model.safetensors", {"format": "pt"})
    merge(spec, out, shard="2/2", shard_bytes=SIZE, quiet=True)
    with pytest.raises(OutputError, match=r"part-1-of-2: is of another merge \(inputs differ\)"):
        join(spec, out, shard_bytes=SIZE)


def test_non_finite_tensors_of_any_part_are_told(family, tmp_path):
    model = tiny.tuned(tiny.llama(), 0)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    tiny.save_model(model, tmp_path / "tuned0")
    spec = spec_of(family)
    spec["models"][0]["model"] = str(tmp_path / "tuned0")
    for index in (1, 2):
        merge(spec, tmp_path / "out", shard=f"{index}/2", shard_bytes=SIZE, quiet=True)
    result = join(spec, tmp_path / "out", shard_bytes=SIZE)
    assert result.non_finite == ["model.layers.1.mlp.up_proj.weight"]


def test_a_part_that_was_killed_goes_on(family, tmp_path):
    spec = tmp_path / "spec.yaml"
    spec.write_text(json.dumps(spec_of(family)))
    merge(spec, tmp_path / "whole", shard_bytes=SIZE, quiet=True)
    code = (
        "import os, signal, sys\nfrom toolkit.merge import run\nown, calls = run._Worker.run, []\n"
        "def stops(self, job):\n    calls.append(job)\n    own(self, job)\n"
        "    if len(calls) == 3:\n        os.kill(os.getpid(), signal.SIGKILL)\n    return True\n"
        "run.FLUSH_EVERY, run._Worker.run = 0, stops\n"
        f"run.merge({str(spec)!r}, {str(tmp_path / 'out')!r}, shard='1/2', shard_bytes={SIZE}, quiet=True)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL
    merge(spec, tmp_path / "out", shard="1/2", shard_bytes=SIZE, resume=True, quiet=True)
    merge(spec, tmp_path / "out", shard="2/2", shard_bytes=SIZE, quiet=True)
    join(spec, tmp_path / "out", shard_bytes=SIZE)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_mistakes(family, tmp_path):
    for text in ("0/2", "3/2", "2", "a/b"):
        with pytest.raises(SpecError, match="expected i/n, such as 2/4"):
            merge(spec_of(family), tmp_path / "out", shard=text, quiet=True)
    with pytest.raises(SpecError, match=r"the output has 1 files; pass --shard-size \d"):
        merge(spec_of(family), tmp_path / "out", shard="1/2", quiet=True)
    adapter = {"output": {"type": "compressed", "as": "svd", "rank": 2}}
    with pytest.raises(SpecError, match="compressed is small; leave out --shard"):
        merge(spec_of(family) | adapter, tmp_path / "out", shard="1/2", quiet=True)
    measured = spec_of(family, "fisher") | {"data": {"samples": 1}}
    with pytest.raises(SpecError):
        merge(measured, tmp_path / "out", shard="1/2", shard_bytes=SIZE, quiet=True)


def test_command(family, tmp_path, capsys):
    spec = tmp_path / "spec.yaml"
    spec.write_text(json.dumps(spec_of(family)))
    words = ["merge", str(spec), str(tmp_path / "out"), "--shard-size", "30KB", "--quiet"]
    for index in (1, 2):
        assert main([*words, "--shard", f"{index}/2"]) == 0
    assert main([*words, "--join", "--shard", "1/2"]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert main([*words, "--join", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(tmp_path / "out")
