"""The engine of learned merges: gradients against autograd through the sum, memory, resuming, and what is refused."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.func import functional_call

import toolkit
from tests import tiny
from tests.merge.learned import problems
from toolkit.checkpoints.compressed import on_base, open_compressed
from toolkit.checkpoints.deltas import chunks
from toolkit.checkpoints.reader import open_checkpoint
from toolkit.checkpoints.writer import staging_path
from toolkit.cli import main
from toolkit.errors import CheckpointError, DataError, MissingError, OutputError, SpecError, UnsupportedError
from toolkit.merge.learning import losses
from toolkit.merge.learning.blocks import Blocks, merge_spec
from toolkit.merge.learning.coefficients import onto_simplex
from toolkit.merge.learning.engine import Engine, base_model
from toolkit.merge.learning.heads import read_head
from toolkit.merge.learning.spec import LearnTask
from toolkit.merge.learning.tasks import Task
from toolkit.merge.learning.vectors import TaskVectors
from toolkit.merge.parameters import matches
from toolkit.merge.run import merge

IDS = torch.tensor([[5, 9, 101, 32, 77, 3, 250, 18], [44, 7, 7, 90, 13, 200, 1, 64]])
GROUPS = {"groups": {"attention": ["self_attn"], "up": ["re:mlp.(up|gate)_proj"]}}


@pytest.fixture(scope="module")
def forms(base, tmp_path_factory) -> dict[str, str]:
    return problems.every_form(base, tmp_path_factory.mktemp("forms"))


def task_vectors(base: Path, forms: dict[str, str]) -> list[dict[str, torch.Tensor]]:
    """Every task vector, whole and in float64, by other code than the engine's."""
    with open_checkpoint(base) as checkpoint:
        start = {name: checkpoint.tensor(name).double() for name in checkpoint.tensors}
        merged = tiny.load_merged(base, Path(forms["lora"])).state_dict()
        rebuilt = on_base(checkpoint, open_compressed(forms["masked"]))
        masked = {}
        for name, info in checkpoint.tensors.items():
            out = np.empty(info.count, np.float32)
            for first, last in chunks(info.shape):
                rebuilt.read(name, first, last, out[first:last])
            masked[name] = torch.from_numpy(out.reshape(info.shape))
    tuned = [problems.weights(forms["full"]), merged, masked]
    return [{name: model[name].double() - value for name, value in start.items()} for model in tuned]


def of_loss(logits: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


@pytest.mark.system("atlas")
@pytest.mark.parametrize("granularity", ["task", "layer", "tensor", "groups"])
def test_gradient_is_that_of_autograd_through_the_sum(granularity, base, forms):
    extra = GROUPS if granularity == "groups" else {}
    engine = problems.engine(base, forms, granularity=granularity, **extra)
    index, taus = engine.blocks.index, task_vectors(base, forms)
    generator = np.random.default_rng(0)
    values = generator.standard_normal((3, len(engine.blocks.groups))) * 0.3
    model = tiny.llama().double()
    c = torch.tensor(values, requires_grad=True)
    mixed = {
        name: value.detach() + sum(c[i, index[name]] * tau[name] for i, tau in enumerate(taus))
        for name, value in model.named_parameters()
    }
    expected = of_loss(functional_call(model, mixed, IDS).logits)
    expected.backward()
    loss, found = engine.gradient(values, [lambda: of_loss(engine.model(IDS).logits)])
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert c.grad.abs().max() > 0.01
    np.testing.assert_allclose(found, c.grad.numpy(), rtol=1e-4, atol=1e-5 * float(c.grad.abs().max()))
    assert engine.loss(values, [lambda: of_loss(engine.model(IDS).logits)]) == pytest.approx(loss)
    assert all(parameter.grad is None for parameter in engine.model.parameters())


def test_number_of_coefficients(base, forms):
    names = list(tiny.llama().state_dict())
    counts = {"task": 1, "layer": 3 + 2, "tensor": len(names)}
    for granularity, count in counts.items():
        blocks = problems.engine(base, forms, granularity=granularity).blocks
        assert len(blocks.groups) == count
        assert sorted(blocks.index) == sorted(names)
    blocks = problems.engine(base, forms, granularity="groups", **GROUPS).blocks
    assert sorted(blocks.groups) == ["attention", "rest", "up"]
    assert blocks.groups[blocks.index["model.layers.1.mlp.gate_proj.weight"]] == "up"
    assert blocks.groups[blocks.index["model.layers.1.mlp.down_proj.weight"]] == "rest"


@pytest.mark.parametrize("granularity", ["task", "layer", "tensor", "groups"])
@pytest.mark.parametrize("density", [None, 0.3])
def test_engine_holds_what_the_plain_spec_gives(granularity, density, base, forms, tmp_path):
    """The written spec, run as any merge, gives the bits that the model had while it was learned."""
    models = {"full": forms["full"], "masked": forms["masked"]}
    vectors = TaskVectors(str(base), models, density=density)
    extra = GROUPS if granularity == "groups" else {}
    blocks = Blocks(list(vectors.jobs), granularity, extra.get("groups"))
    engine = Engine(vectors, blocks, base_model(vectors, torch.device("cpu"), encoder=False))
    values = np.random.default_rng(1).random((2, len(blocks.groups))).round(3)
    engine.set(values)
    spec = merge_spec(vectors.template, vectors.sources, blocks, values, None)
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(spec))
    merge(tmp_path / "merge.yaml", tmp_path / "out", quiet=True)
    held, start = engine.model.state_dict(), problems.weights(base)
    for name, value in problems.weights(tmp_path / "out").items():
        if density is None:
            assert torch.equal(held[name], value), name
        else:  # TIES adds its terms in another order
            torch.testing.assert_close(held[name], value, rtol=1e-6, atol=1e-6)
        assert not torch.equal(value, start[name])


def test_task_vectors_kept_in_memory_are_the_same(base, forms):
    streamed, kept = (TaskVectors(str(base), forms, keep=size) for size in (0, 10**6))
    held = 0
    for name in streamed.jobs:
        for _ in range(2):
            for one, other in zip(streamed.slices(name), kept.slices(name), strict=True):
                assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
        held += sum(base.nbytes + x.nbytes for _, base, x in kept._kept.get(name, []))
    assert 0 < held <= 10**6
    assert len(kept._kept) < len(streamed.jobs), "the budget is for some of them"


PEAK = """
import re, sys, threading, time
from pathlib import Path
def anonymous():
    return int(re.search(r'RssAnon:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])
import torch
import toolkit
torch.set_num_threads(1)
peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
toolkit.learn(sys.argv[1], sys.argv[2], quiet=True)
done = True
thread.join()
print('peak', peak)
"""


def test_peak_memory_does_not_grow_with_the_number_of_task_vectors(tmp_path):
    """Anonymous memory with 2 and with 16 task vectors of 28 MB each is the same within 5%."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "initializer_range": 0.02}
    base = tiny.save_model(tiny.llama(**sizes), tmp_path / "base")
    tuned = tiny.save_model(tiny.tuned(tiny.llama(**sizes), 1), tmp_path / "tuned")
    assert (tuned / "model.safetensors").stat().st_size > 25e6
    data = problems.rows(tmp_path / "rows.jsonl", [{"prompt": "one two"}, {"prompt": "three four"}])
    peaks = []
    for count in (2, 16):
        models = {}
        for index in range(count):
            folder = tmp_path / f"{count}-{index}"
            folder.symlink_to(tuned)
            models[f"m{index}"] = str(folder)
        spec = {"method": "adamerging", "base_model": str(base), "models": models, "tasks": {"one": data}}
        spec |= {"parameters": {"steps": 2}, "merged": False, "device": "cpu"}
        (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
        command = [sys.executable, "-c", PEAK, tmp_path / "spec.yaml", tmp_path / f"out{count}"]
        environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).parents[3]))
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        peaks.append(int(re.search(r"peak (\d+)", done.stdout)[1]))
    assert peaks[1] < 1.05 * peaks[0], peaks
    assert peaks[0] < 1.05 * peaks[1], peaks


@pytest.mark.system("adamerging")
def test_nothing_that_is_read_changes(tmp_path):
    spec = problems.classification(tmp_path)
    files = [Path(f) / "model.safetensors" for f in (spec["base_model"], *spec["models"].values())]
    before = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    toolkit.learn(spec | {"method": "adamerging", "parameters": {"steps": 3}}, tmp_path / "out", quiet=True)
    assert [hashlib.sha256(file.read_bytes()).hexdigest() for file in files] == before


@pytest.mark.parametrize("method", ["adamerging", "lorahub"])
def test_a_stopped_run_goes_on_to_the_same_result(method, tmp_path, monkeypatch):
    spec = problems.classification(tmp_path) | {"method": method, "parameters": {"steps": 6}}
    spec["parameters"] |= {"batch_size": 5} if method == "adamerging" else {}
    whole = toolkit.learn(spec, tmp_path / "whole", quiet=True)
    calls, own = 0, Engine.set

    def stops(engine, values):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        own(engine, values)

    monkeypatch.setattr(Engine, "set", stops)
    with pytest.raises(KeyboardInterrupt):
        toolkit.learn(spec, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
    assert staging_path(tmp_path / "out").exists()
    before = calls
    resumed = toolkit.learn(spec, tmp_path / "out", resume=True, quiet=True)
    assert resumed.coefficients == whole.coefficients
    assert resumed.numbers["losses"] == whole.numbers["losses"]
    assert 0 < calls - before < 6 * (1 if method == "adamerging" else 2), "what was done is not done again"
    names = {"merge.yaml", "merged", "results.json", "results.md"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for name in ("merge.yaml", "merged/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_nothing_is_left_of_a_run_that_failed_at_once(tmp_path):
    spec = problems.classification(tmp_path) | {"method": "atlas"}
    problems.rows(tmp_path / "task0.jsonl", [{"text": "a", "label": "perhaps"}])
    with pytest.raises(DataError):
        toolkit.learn(spec, tmp_path / "out", quiet=True)
    assert not staging_path(tmp_path / "out").exists()


def test_groups_may_be_written_as_one_filter(tmp_path):
    parameters = {"granularity": "groups", "groups": {"attention": "attention"}, "steps": 1}
    spec = problems.classification(tmp_path) | {"method": "atlas", "parameters": parameters}
    result = toolkit.learn(spec | {"merged": False}, tmp_path / "out", quiet=True)
    assert set(result.coefficients["task0"]) == {"attention", "rest"}
    text = (tmp_path / "out" / "merge.yaml").read_text()
    assert text.count("filter:") == 4


def test_another_spec_is_not_gone_on_with(tmp_path):
    spec = problems.classification(tmp_path) | {"method": "adamerging", "parameters": {"steps": 2}}
    place = staging_path(tmp_path / "out")
    place.mkdir()
    (place / "learn.json").write_text("of something else")
    (place / "state.pt").write_bytes(b"which nobody may read")
    result = toolkit.learn(spec, tmp_path / "out", resume=True, quiet=True)
    assert result.numbers["steps"] == 2


@pytest.mark.parametrize("granularity", ["layer", "tensor", "groups"])
def test_a_filter_matches_the_tensors_of_its_group_alone(granularity):
    """In a model of twelve layers, where the first letters of `layers.1` are those of `layers.10` too."""
    names = [f"model.layers.{i}.{part}.weight" for i in range(12) for part in ("self_attn.q_proj", "mlp.up_proj")]
    names = ["model.embed_tokens.weight", *names, "model.norm.weight"]
    blocks = Blocks(names, granularity, GROUPS["groups"] if granularity == "groups" else None)
    assert len(blocks.groups) == {"layer": 14, "tensor": len(names), "groups": 3}[granularity]
    for name in names:
        matching = [group for group in range(len(blocks.groups)) if matches(blocks.filter_of(group), name)]
        assert matching == [blocks.index[name]]


@pytest.mark.parametrize("seed", [0, 1])
def test_batches_take_every_row_before_any_again(seed, tmp_path):
    task = Task("one", LearnTask(data=["x"]), 7)
    taken = [row for step in range(7) for row in task.batch(step, 3, seed)]
    assert len(taken) == 21
    for epoch in range(3):
        assert sorted(taken[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert taken[:7] != taken[7:14]
    assert taken[:3] == task.batch(0, 3, seed)
    assert taken[:7] != task.batch(0, 7, seed + 1)
    assert sorted(task.batch(5, 100, seed)) == list(range(7))


def test_losses_by_their_definitions():
    generator = torch.Generator().manual_seed(0)
    logits, other = (torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = logits.softmax(-1), (other / 2).softmax(-1)
    entropy = -sum(float(p[i, j]) * float(p[i, j].log()) for i in range(5) for j in range(4)) / 5
    assert float(losses.entropy(logits)) == pytest.approx(entropy, rel=1e-6)
    assert float(losses.entropy(torch.zeros(3, 8))) == pytest.approx(np.log(8))
    targets = torch.tensor([0, 3, 1, 1, 2])
    likelihood = -sum(float(p[i, t].log()) for i, t in enumerate(targets)) / 5
    assert float(losses.cross_entropy(logits, targets)) == pytest.approx(likelihood, rel=1e-6)
    soft = (logits / 2).softmax(-1)
    divergence = sum(float(q[i, j] * (q[i, j] / soft[i, j]).log()) for i in range(5) for j in range(4)) / 5
    assert float(losses.distillation(logits, other, 2.0)) == pytest.approx(divergence, rel=1e-5)
    assert float(losses.distillation(other, other, 2.0)) == pytest.approx(0, abs=1e-7)
    a, b = (x / x.norm(dim=-1, keepdim=True) for x in (logits, other))
    shares = (a @ b.T / 0.3).exp()
    expected = -sum(float((shares[i, i] / shares[i].sum()).log()) for i in range(5)) / 5
    assert float(losses.contrastive(logits, other, 0.3)) == pytest.approx(expected, rel=1e-6)


def test_nearest_point_of_the_simplex():
    """Against all points of a fine grid on it, and on points that lie on it already."""
    grid = np.array([(i, j, 60 - i - j) for i, j in product(range(61), repeat=2) if i + j <= 60]) / 60
    points = np.random.default_rng(0).standard_normal((3, 40))
    found = onto_simplex(points)
    assert np.all(found >= 0)
    np.testing.assert_allclose(found.sum(axis=0), 1, rtol=1e-12)
    for point, nearest in zip(points.T, found.T, strict=True):
        best = np.square(grid - point).sum(axis=1).min()
        assert np.square(nearest - point).sum() <= best + 1e-12
        assert np.square(nearest - point).sum() >= best - 0.1
    np.testing.assert_allclose(onto_simplex(found), found, atol=1e-12)
    np.testing.assert_array_equal(onto_simplex(np.array([[5.0], [0.0]])), [[1], [0]])


@pytest.mark.parametrize(("positions", "counted"), [("last", 3), ("answer", 15), ("all", 21)])
def test_positions_of_a_language_model_that_count(positions, counted, base, tmp_path):
    """Entropies at those positions, one by one from the logits of each row alone."""
    data = [{"prompt": "ab", "completion": "cd" * (i + 1)} for i in range(3)]
    prompts = [{"prompt": "a" * 3}, {"text": "bcd"}, {"prompt": "xyz" * 4}]
    given = prompts if positions == "last" else data
    spec = {
        "method": "adamerging",
        "base_model": str(base),
        "models": {"a": str(tiny.save_model(tiny.tuned(tiny.llama(), 1), tmp_path / "a"))},
        "tasks": {"a": {"data": problems.rows(tmp_path / "a.jsonl", given), "positions": positions}},
        "parameters": {"steps": 1, "start": 0.0, "granularity": "task"},
        "merged": False,
    }
    loss = toolkit.learn(spec, tmp_path / "out", quiet=True).numbers["losses"][0]
    model, entropies = tiny.llama(), []
    for row in given:
        text = row.get("prompt") or row["text"]
        asked, answer = list(text.encode()), list(row.get("completion", "").encode())
        # Ids of the embedded tokenizer are bytes; 257 ends a text.
        tokens = asked + answer + ([257] if answer else [])
        logits = model(torch.tensor([tokens])).logits[0].detach()
        places = {"last": [len(tokens) - 1], "all": range(len(tokens))}.get(
            positions, range(len(asked) - 1, len(tokens) - 1)
        )
        for place in places:
            p = logits[place].double().softmax(-1)
            entropies.append(-float((p * p.log()).sum()))
    assert len(entropies) == counted
    assert loss == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)


def test_distillation_moves_towards_the_expert(base, tmp_path):
    """Coefficient 1 is the expert itself, where the divergence is 0."""
    tuned = str(tiny.save_model(tiny.tuned(tiny.llama(), 1, scale=0.05), tmp_path / "a"))
    data = problems.rows(tmp_path / "a.jsonl", [{"prompt": f"row {i}"} for i in range(6)])
    parameters = {"loss": "distillation", "granularity": "task", "learning_rate": 0.05, "steps": 50, "batch_size": 6}
    spec = {"method": "atlas", "base_model": str(base), "models": {"a": tuned}, "tasks": {"a": data}}
    result = toolkit.learn(spec | {"parameters": parameters, "merged": False}, tmp_path / "out", quiet=True)
    assert result.coefficients["a"]["all"] == pytest.approx(1, abs=0.05)
    assert not list((tmp_path / "out").glob("teacher*"))


def test_head_survives_its_folder_and_broken_ones_are_refused(tmp_path):
    place = Path(problems.head(tmp_path / "head", 3))
    read = read_head(place)
    assert read.labels == ("yes", "no", "maybe")
    assert torch.equal(read.weight, torch.randn(3, problems.HIDDEN, generator=torch.Generator().manual_seed(3)))
    (place / "head.json").write_text('{"labels": ["yes", "no"]}')
    with pytest.raises(CheckpointError, match=r"and 2 labels do not fit"):
        read_head(place)
    with pytest.raises(MissingError, match=r"a folder with head\.json and head\.safetensors"):
        read_head(tmp_path)


WRONG = {
    "no such method": (
        {"method": "adamergin"},
        r"method: unknown learned method 'adamergin'; did you mean 'adamerging'",
    ),
    "unknown parameter": (
        {"parameters": {"stepz": 3}},
        r"parameters\.stepz: unknown key 'stepz'; did you mean 'steps'",
    ),
    "start outside": ({"parameters": {"start": 2.0}}, r"parameters: start 2 is not within 0 to 1"),
    "groups alone": ({"parameters": {"groups": {"a": "x"}}}, "groups and granularity: groups belong together"),
    "no tasks": ({"tasks": {}}, r"tasks: required: what adamerging measures models on"),
    "positions with a head": (
        {"tasks": {"task0": {"data": "x", "head": "h", "positions": "all"}}},
        r"tasks\.task0\.positions",
    ),
    "no head": ({"encoder": True, "tasks": {"task0": "x.jsonl"}}, r"tasks\.task0\.head: required"),
    "expert of another name": (
        {"parameters": {"loss": "distillation"}, "tasks": {"task9": {"data": "x", "head": "h"}}},
        r"tasks\.task9: distillation is from the model of the task's name; did you mean 'task[01]'",
    ),
    "pairs with a head": (
        {"parameters": {"loss": "contrastive"}},
        r"tasks\.task0\.head: contrastive compares the vectors",
    ),
    "no such model": ({"models": {"task0": "nowhere/at/all"}}, r"models\.task0: nowhere/at/all: no such folder"),
    "not compressed": ({"models": "BASE"}, "expected name: model for each, or a folder of compressed deltas"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_before_a_model_is_loaded(case, tmp_path):
    changes, message = WRONG[case]
    spec = problems.classification(tmp_path) | {"method": "adamerging"}
    changes = {k: spec["base_model"] if v == "BASE" else v for k, v in changes.items()}
    with pytest.raises(SpecError, match=message):
        toolkit.learn(spec | changes, tmp_path / "out", quiet=True)
    assert not staging_path(tmp_path / "out").exists()
    assert not (tmp_path / "out").exists()


def test_base_among_the_models(tmp_path):
    spec = problems.classification(tmp_path) | {"method": "adamerging"}
    spec["models"]["task0"] = spec["base_model"]
    with pytest.raises(SpecError, match=r"models\.task0: is the base itself"):
        toolkit.learn(spec, tmp_path / "out", quiet=True)


def test_rows_and_outputs_that_cannot_be_used(tmp_path):
    spec = problems.classification(tmp_path) | {"method": "atlas"}
    file = tmp_path / "task0.jsonl"
    problems.rows(file, [{"text": "a", "label": "perhaps"}])
    with pytest.raises(
        DataError, match=r"task0\.jsonl:1: label 'perhaps' is none of the head's .*known: yes, no, maybe"
    ):
        toolkit.learn(spec, tmp_path / "out", quiet=True)
    problems.rows(file, [{"label": "yes"}])
    with pytest.raises(DataError, match=r"task0\.jsonl:1: expected text, got label"):
        toolkit.learn(spec, tmp_path / "out", quiet=True)
    spec["tasks"]["task0"]["data"] = str(tmp_path / "nowhere.jsonl")
    with pytest.raises(MissingError, match="no such data file"):
        toolkit.learn(spec, tmp_path / "out", quiet=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(OutputError, match="exists already"):
        toolkit.learn(spec, tmp_path / "full", quiet=True)


def test_changes_of_what_does_not_run(base, tmp_path):
    """A causal language model's head is changed, but its body alone is run."""
    tuned = tiny.save_model(tiny.tuned(tiny.llama(), 1), tmp_path / "a")
    data = problems.rows(tmp_path / "a.jsonl", [{"text": "a", "positive": "b"}] * 2)
    spec = {"method": "self_positioning", "base_model": str(base), "models": {"a": str(tuned)}, "tasks": {"a": data}}
    with pytest.raises(UnsupportedError, match=r"lm_head\.weight is changed by a model, but LlamaModel has no such"):
        toolkit.learn(spec, tmp_path / "out", quiet=True)


def test_command(tmp_path, capsys):
    spec = problems.classification(tmp_path) | {"method": "adamerging", "parameters": {"steps": 2}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    assert main(["learn", str(tmp_path / "spec.yaml"), str(tmp_path / "out"), "-q", "--set", "parameters.steps=1"]) == 0
    assert "coefficients by adamerging" in capsys.readouterr().out
    assert main(["merge", str(tmp_path / "out" / "merge.yaml"), str(tmp_path / "again"), "-q"]) == 0
    one, other = (tmp_path / place / "model.safetensors" for place in ("out/merged", "again"))
    assert one.read_bytes() == other.read_bytes()
