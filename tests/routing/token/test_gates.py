"""Gates are trained over frozen experts, kept beside them, and refused when they are of something else."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests import tiny
from tests.routing.token.by_hand import changes_of, save_experts, with_routes
from toolkit.checkpoints.adapters import open_adapter
from toolkit.cli import main
from toolkit.errors import CheckpointError, MissingError, OutputError, SpecError, UnsupportedError
from toolkit.models.load import load_model
from toolkit.routing.token import fit
from toolkit.routing.token.experts import read_expert
from toolkit.routing.token.fit import attached, fit_gates
from toolkit.routing.token.router import load_token_router, make_token_router


@pytest.fixture
def experts(base, tmp_path):
    return {name: folder for name, folder in save_experts(base, tmp_path).items() if name in ("one", "three")}


def says(model, prompt: str, length: int = 12) -> str:
    """Continue a text with the likeliest printable ASCII; ids are bytes."""
    ids = list(prompt.encode())
    with torch.inference_mode():
        for _ in range(length):
            ids.append(32 + int(model(torch.tensor([ids])).logits[0, -1, 32:127].argmax()))
    return bytes(ids[len(prompt) :]).decode()


@pytest.fixture
def spec(base, experts, tmp_path):
    """Gates to train on rows whose answers are what the experts themselves say."""
    found = {}
    for name, folder in experts.items():
        model, rows = tiny.load_merged(base, folder), []
        for i in range(4):
            prompt = f"{name} {i}"
            rows.append({"prompt": prompt, "completion": says(model, prompt)})
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        found[name] = {"adapter": str(folder), "data": str(tmp_path / f"{name}.jsonl")}
    return {"base": str(base), "experts": found, "steps": 20, "batch_size": 8, "learning_rate": 0.05, "device": "cpu"}


def test_a_gate_of_zero_lets_half_of_a_change_through(base, experts):
    model, expert = tiny.load_merged(base, None), read_expert(experts["one"])
    ids = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))
    gates = {site: torch.zeros(pair.a_rK.shape[1]) for site, pair in expert.pairs.items()}
    with torch.inference_mode():
        before = model(ids).logits
        with attached(model, {site: fit._gated(pair, gates[site]) for site, pair in expert.pairs.items()}):
            got = model(ids).logits
        assert torch.equal(model(ids).logits, before), "something was left on the model"
        half = with_routes(tiny.load_merged(base, None), [changes_of(experts["one"])], lambda *_: {0: 0.5})
        torch.testing.assert_close(got, half(ids).logits, rtol=1e-4, atol=1e-3)


def test_phatgoose_gates_lie_beside_adapters_that_stay_as_they_are(spec, experts):
    before = {name: open_adapter(folder).content_hash for name, folder in experts.items()}
    report = fit_gates(spec, quiet=True)
    assert before == {name: open_adapter(folder).content_hash for name, folder in experts.items()}
    for first, last in report.numbers["losses"].values():
        assert last < 0.9 * first
    router = make_token_router("phatgoose", {n: read_expert(f) for n, f in experts.items()}, {"top_k": 1})
    assert {s for s, own in router.sites.items() if 0 in own.experts} == set(read_expert(experts["one"]).pairs)
    assert all(own.vectors.abs().sum() > 0 for own in router.sites.values())
    with pytest.raises(OutputError, match=r"phatgoose\.json"):
        fit_gates(spec, quiet=True)
    again = fit_gates(spec, quiet=True, overwrite=True)
    assert again.numbers == report.numbers, "the same seed gives the same gates"


def test_a_gate_of_another_content_is_refused(spec, base, experts, tmp_path):
    fit_gates(spec, quiet=True)
    other = tiny.save_lora(base, tmp_path / "other", seed=5)
    for end in ("json", "safetensors"):
        shutil.copy(experts["one"] / f"phatgoose.{end}", other)
    with pytest.raises(CheckpointError, match="another content"):
        make_token_router("phatgoose", {"other": read_expert(other)}, {})
    with pytest.raises(MissingError, match=r"no phatgoose.json"):
        make_token_router("phatgoose", {"o": read_expert(tiny.save_lora(base, tmp_path / "p", seed=6))}, {})


@pytest.mark.parametrize(("top_k", "dispatch"), [(2, {}), (1, {}), (1, {"capacity_factor": 1.0, "by_priority": True})])
def test_a_mixture_learns_and_is_saved_with_the_contents_of_its_experts(top_k, dispatch, spec, experts, tmp_path):
    mixture = spec | {"router": "mixture", "dispatch": dispatch, "steps": 40, "parameters": {"top_k": top_k}}
    report = fit_gates(mixture, tmp_path / "mixture", quiet=True)
    ((first, last),) = report.numbers["losses"].values()
    assert last < first - 0.2
    router = load_token_router(tmp_path / "mixture")
    assert router.experts == ("one", "three")
    assert router.keys == tuple(open_adapter(folder).content_hash for folder in experts.values())
    assert router.params.model_dump()["top_k"] == top_k
    with pytest.raises(OutputError):
        fit_gates(mixture, tmp_path / "mixture", quiet=True)


@pytest.mark.system("tutel")
def test_a_mixture_without_any_capacity_is_the_base(spec, base, tmp_path):
    """With no place at any expert every row is dropped, so the loss is that of the base alone."""
    losses = []
    for dispatch in ({"capacity_factor": 1e-9}, {"capacity_factor": 0}):
        mixture = spec | {"router": "mixture", "dispatch": dispatch, "steps": 1}
        report = fit_gates(mixture, tmp_path / str(len(losses)), quiet=True)
        losses.append(next(iter(report.numbers["losses"].values()))[0])
    loaded = load_model(base, dtype=torch.float32)
    checked = fit.specs.load(spec, fit.GatesSpec)
    rows = [row for e in checked.experts.values() for row in fit._rows(checked, loaded, e.data)]
    batch = fit.Collator(tiny.llama_config().pad_token_id or 0)(fit.random.Random(0).choices(rows, k=8))
    with torch.inference_mode():
        assert losses[0] == pytest.approx(float(loaded.model(**batch).loss), rel=1e-6)
    assert abs(losses[1] - losses[0]) > 1e-3


def test_command(spec, experts, tmp_path, capsys):
    path = tmp_path / "gates.yaml"
    path.write_text(json.dumps(spec | {"router": "mixture", "smoke": {"steps": 2}}))
    assert main(["route", "gates", str(path), str(tmp_path / "out"), "--smoke", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == str(tmp_path / "out")
    assert load_token_router(tmp_path / "out").kind == "mixture"


def test_wrong_specs(spec, base, experts, tmp_path):
    wrong = {
        "gates are trained for": {"router": "arrow"},
        "belong to a mixture": {"dispatch": {"balance": 1}},
        "a mixture needs a folder": {"router": "mixture"},
        "parameters.top_k": {"parameters": {"top_k": 0}},
        "steps": {"steps": 0},
    }
    for message, change in wrong.items():
        with pytest.raises(SpecError, match=message):
            fit_gates(spec | change, quiet=True)
    small = tiny.save_model(tiny.llama(num_hidden_layers=2), tmp_path / "small")
    with pytest.raises(UnsupportedError, match=r"layers.2.* does not have"):
        fit_gates(spec | {"base": str(small)}, quiet=True)
