"""Fused logits against closed forms, scipy and brute force; answers against transformers' own generate."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, rel_entr, softmax
from tokenizers import Tokenizer

from tests import tiny
from toolkit.cli import main
from toolkit.embedded.tokenizer import build_tokenizer
from toolkit.errors import DataError, OutputError, RequestError, SpecError
from toolkit.routing.cascade import Cascade, confidence
from toolkit.routing.fusion.arithmetic import divergence, fused
from toolkit.routing.fusion.methods import dynamic_logits_fusion as dynamic
from toolkit.routing.fusion.methods import logit_arithmetic as fixed
from toolkit.routing.fusion.models import Reader
from toolkit.routing.fusion.run import FusedModel, fuse_logits

pytestmark = pytest.mark.system("dynamic_logits_fusion")


def logits(count=3, rows=2, size=40, seed=0, scale=1.5):
    """Large, base and `count` experts, float32."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((rows, size)) * scale
    large = base + rng.standard_normal((rows, size)) * 0.5
    experts = base + rng.standard_normal((count, rows, size))
    return tuple(torch.tensor(x, dtype=torch.float32) for x in (large, base, experts))


def objective(large, base, experts, alpha):
    """The paper's sum for one row in float64, with scipy's own relative entropy."""
    large, base, experts = (np.asarray(x, np.float64) for x in (large, base, experts))
    p, q = softmax(large), softmax(base)
    mixed = softmax(large + np.tensordot(alpha, experts - base, 1))
    total = 0.0
    for tuned in softmax(experts, axis=-1):
        total += (rel_entr(mixed, p).sum() - rel_entr(tuned, q).sum()) ** 2
        total += (rel_entr(p, mixed).sum() - rel_entr(q, tuned).sum()) ** 2
    return total


def weights(found, **params):
    large, base, experts = found
    return dynamic.weights(large, base, experts, [str(i) for i in range(len(experts))], dynamic.Params(**params))


def test_one_expert_is_the_best_of_the_grid():
    found = logits(count=1, rows=4)
    grid = np.linspace(0, 2, 21)
    for row, alpha in enumerate(weights(found)[:, 0].tolist()):
        values = [objective(found[0][row], found[1][row], found[2][:, row], [a]) for a in grid]
        assert alpha == pytest.approx(grid[int(np.argmin(values))], abs=1e-6)


def test_more_rounds_reach_what_scipy_finds():
    found = logits(count=1, rows=6, seed=3)
    for row, alpha in enumerate(weights(found, rounds=5)[:, 0].tolist()):

        def value(a, row=row):
            return objective(found[0][row], found[1][row], found[2][:, row], [a])

        near = weights(found)[row, 0].item()
        best = minimize_scalar(value, bounds=(max(0, near - 0.1), min(2, near + 0.1)), options={"xatol": 1e-9})
        assert alpha == pytest.approx(best.x, abs=2e-3)
        assert value(alpha) <= best.fun + 1e-6


def test_of_several_experts_the_one_that_fits_all_targets_best():
    found = logits(count=3, rows=5, seed=1)
    grid = np.linspace(0, 2, 21)
    got = weights(found)
    for row in range(5):
        values = {}
        for t in range(3):
            for a in grid:
                alpha = np.eye(3)[t] * a
                values[t, a] = objective(found[0][row], found[1][row], found[2][:, row], alpha)
        t, a = min(values, key=values.get)
        np.testing.assert_allclose(got[row], np.eye(3)[t] * a, atol=1e-6)
    assert (torch.count_nonzero(got, dim=1) <= 1).all()
    assert len({int(row.argmax()) for row in got}) > 1, "the choice differs from row to row"


def test_all_experts_at_once_is_brute_force_over_the_grid():
    found = logits(count=2, rows=3, seed=5)
    got = weights(found, experts="all", steps=8)
    grid = np.linspace(0, 2, 9)
    for row in range(3):
        points = [(a, b) for a in grid for b in grid]
        values = [objective(found[0][row], found[1][row], found[2][:, row], p) for p in points]
        np.testing.assert_allclose(got[row], points[int(np.argmin(values))], atol=1e-6)
        alone = weights(found)[row].numpy()
        fine = weights(found, experts="all", rounds=3)[row].numpy()
        assert objective(found[0][row], found[1][row], found[2][:, row], fine) <= (
            objective(found[0][row], found[1][row], found[2][:, row], alone) + 1e-6
        )


def test_weight_is_one_where_the_large_model_is_the_small_one():
    _, base, experts = logits(count=1, rows=5)
    alpha = weights((base, base, experts))
    np.testing.assert_allclose(alpha, 1, atol=1e-6)
    np.testing.assert_allclose(fused(base, experts - base, alpha), experts[0], atol=1e-5)


def test_an_expert_that_is_the_base_leaves_the_large_model_to_the_bit():
    large, base, _ = logits()
    alpha = weights((large, base, base[None]), rounds=3)
    assert (alpha == 0).all()
    assert torch.equal(fused(large, base[None] - base, alpha), large)


def test_divergence_grows_with_the_weight_and_is_scipys():
    large, base, experts = logits(count=1, rows=1)
    p = large.double().log_softmax(-1)
    grown = []
    for a in np.linspace(0, 3, 61):
        mixed = fused(large, experts - base, torch.tensor([[a]])).double().log_softmax(-1)
        grown.append(divergence(mixed, p).item())
        assert grown[-1] == pytest.approx(rel_entr(mixed.exp().numpy(), p.exp().numpy()).sum(), abs=1e-9)
    assert (np.diff(grown) > 0).all()
    closed = torch.tensor([[-torch.inf, 0.0, 0.0]]).log_softmax(-1)
    assert divergence(closed, torch.zeros(1, 3).log_softmax(-1)).item() == pytest.approx(np.log(1.5))


def test_constants_added_to_any_model_change_nothing():
    large, base, experts = logits(count=2)
    moved = (large + 3, base - 5, experts + torch.tensor([7.0, -2.0])[:, None, None])
    alpha, again = weights((large, base, experts)), weights(moved)
    np.testing.assert_allclose(alpha, again, atol=1e-6)
    before = fused(large, experts - base, alpha).log_softmax(-1)
    np.testing.assert_allclose(fused(moved[0], moved[2] - moved[1], again).log_softmax(-1), before, atol=1e-5)


def test_fixed_weights():
    large, base, experts = logits(count=2)
    for alpha, expected in ((0.5, [0.5, 0.5]), ({"b": 1.5}, [0.0, 1.5])):
        params = fixed.Params(alpha=alpha)
        got = fused(large, experts - base, fixed.weights(large, base, experts, ["a", "b"], params))
        wanted = large.double() + sum(w * (e - base).double() for w, e in zip(expected, experts, strict=True))
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    zero = fixed.weights(large, base, experts, ["a", "b"], fixed.Params(alpha=0))
    assert torch.equal(fused(large, experts - base, zero), large)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A large model of another size, a small base, a fine-tune and a LoRA of it."""
    root = tmp_path_factory.mktemp("fusion")
    small = tiny.llama(seed=1)
    found = {"large": tiny.save_model(tiny.llama(seed=2, hidden_size=64, num_hidden_layers=4), root / "large")}
    found["base"] = tiny.save_model(small, root / "base")
    found["tuned"] = tiny.save_model(tiny.tuned(small, 0, scale=0.1), root / "tuned")
    found["lora"] = tiny.save_lora(found["base"], root / "lora")
    return {name: str(path) for name, path in found.items()}


def spec_of(folders, **changes):
    spec = {"large": folders["large"], "base": folders["base"], "experts": {"tuned": folders["tuned"]}}
    return spec | {"chat": False, "max_tokens": 12, "device": "cpu"} | changes


def steered_by_hand(folders, experts, prompt, alpha, count):
    """Greedy tokens and log-probabilities, every step from whole sequences without a cache."""
    names = [folders["large"], folders["base"], *experts]
    models = [tiny.load_merged(folders["base"] if "lora" in n else n, n if "lora" in n else None) for n in names]
    ids = build_tokenizer(tiny.CONTEXT).encode(prompt)
    logprobs, start = [], len(ids)
    for _ in range(count):
        with torch.inference_mode():
            large, base, *tuned = [m(torch.tensor([ids])).logits[0, -1].double().numpy() for m in models]
        mixed = log_softmax(large + sum(a * (t - base) for a, t in zip(alpha, tuned, strict=True)))
        ids.append(int(mixed.argmax()))
        logprobs.append(float(mixed[ids[-1]]))
    return ids[start:], logprobs


@pytest.mark.parametrize("names", [["tuned"], ["tuned", "lora"]])
def test_answer_is_that_of_whole_sequences_without_a_cache(names, folders):
    experts = {name: folders[name] for name in names}
    alpha = {"tuned": 0.7, "lora": 0.4}
    spec = spec_of(folders, experts=experts, method="logit_arithmetic", parameters={"alpha": alpha}, max_tokens=10)
    if len(names) == 1:
        spec["parameters"] = {"alpha": 0.7}
    answer = FusedModel(spec).answer("Once upon a time")
    tokens, logprobs = steered_by_hand(
        folders, list(experts.values()), "Once upon a time", [alpha[n] for n in names], len(answer.tokens)
    )
    assert answer.tokens == tokens
    np.testing.assert_allclose(answer.logprobs, logprobs, atol=1e-4)
    assert answer.weights == [pytest.approx({name: alpha[name] for name in names})] * len(tokens)


def test_without_weight_it_is_the_large_model_and_its_own_expert_is_the_expert(folders):
    ids = build_tokenizer(tiny.CONTEXT).encode("Once upon a time")
    alone = FusedModel(spec_of(folders, method="logit_arithmetic", parameters={"alpha": 0})).answer("Once upon a time")
    assert alone.tokens == tiny.greedy(tiny.load_merged(folders["large"], None), ids, len(alone.tokens))
    own = FusedModel(spec_of(folders, large=folders["base"])).answer("Once upon a time")
    assert own.tokens == tiny.greedy(tiny.load_merged(folders["tuned"], None), ids, len(own.tokens))
    assert own.weights == [pytest.approx({"tuned": 1.0}, abs=1e-6)] * len(own.tokens)


def test_dynamic_answer_has_the_weights_of_every_step(folders):
    spec = spec_of(folders, experts={"tuned": folders["tuned"], "lora": folders["lora"]})
    answer = FusedModel(spec).answer("The fox")
    models = [tiny.load_merged(folders[n], None) for n in ("large", "base", "tuned")]
    models.append(tiny.load_merged(folders["base"], folders["lora"]))
    ids = build_tokenizer(tiny.CONTEXT).encode("The fox")
    for token, step in zip(answer.tokens, answer.weights, strict=True):
        with torch.inference_mode():
            large, base, *tuned = [m(torch.tensor([ids])).logits[:, -1] for m in models]
        alpha = weights((large, base, torch.stack(tuned)))
        # Two experts may fit equally well to the last digits; what counts is how well.
        values = [
            objective(large[0], base[0], torch.stack(tuned)[:, 0], a)
            for a in (alpha[0].numpy(), np.array(list(step.values())))
        ]
        assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-6)
        mixed = fused(large, torch.stack(tuned) - base, torch.tensor([list(step.values())]))
        assert int(mixed.argmax()) == token
        ids.append(token)
    assert len({tuple(step.values()) for step in answer.weights}) > 1


def test_sampling_is_seeded_and_follows_the_fused_probabilities(folders):
    spec = spec_of(folders, temperature=1.0, max_tokens=1, method="logit_arithmetic")
    model = FusedModel(spec)
    counts = np.zeros(model.large.model.config.vocab_size)
    for seed in range(300):
        model.spec = model.spec.model_copy(update={"seed": seed})
        counts[model.answer("Once").tokens[0]] += 1
    again = model.answer("Once").tokens
    assert model.answer("Once").tokens == again
    ids = torch.tensor([build_tokenizer(tiny.CONTEXT).encode("Once")])
    with torch.inference_mode():
        large, base, tuned = [tiny.load_merged(folders[n], None)(ids).logits[0, -1] for n in ("large", "base", "tuned")]
    expected = (large + tuned - base).softmax(-1).numpy()
    for top_p in (0.3, 0.8):
        model.spec = model.spec.model_copy(update={"top_p": top_p})
        drawn = set()
        for seed in range(60):
            model.spec = model.spec.model_copy(update={"seed": seed})
            drawn.add(model.answer("Once").tokens[0])
        order = np.argsort(-expected)
        kept = order[: np.searchsorted(np.cumsum(expected[order]), top_p) + 1]
        assert drawn <= set(kept.tolist())
    top = expected.argmax()
    assert abs(counts[top] / 300 - expected[top]) < 4 * np.sqrt(expected[top] * (1 - expected[top]) / 300)
    assert np.abs(counts / 300 - expected).sum() < 0.6


def test_reader_goes_on_where_it_was(folders):
    model = tiny.load_merged(folders["base"], None)
    reader, ids = Reader(model), torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    with torch.inference_mode():
        for length in (3, 4, 7):
            np.testing.assert_allclose(reader(ids[:, :length]), model(ids[:, :length]).logits[:, -1], atol=1e-4)


def test_widths_that_differ_by_padding_are_cut(folders, tmp_path):
    """Models of one family pad their vocabularies to different numbers of rows."""
    size = tiny.llama_config().vocab_size
    wide = tiny.save_model(tiny.llama(seed=2, hidden_size=64, vocab_size=size + 64), tmp_path / "wide")
    answer = FusedModel(spec_of(folders, large=str(wide))).answer("Once")
    assert max(answer.tokens) < size


def test_other_vocabularies_are_refused_all_at_once(folders, tmp_path):
    other = tiny.save_model(tiny.llama(seed=1), tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    Tokenizer.from_str(json.dumps(tokenizer)).save(str(other / "tokenizer.json"))
    with pytest.raises(SpecError) as caught:
        FusedModel(spec_of(folders, base=str(other), experts={"tuned": folders["tuned"], "x": str(other)}))
    assert [problem.where for problem in caught.value.problems] == ["base", "experts.x"]
    assert "4 entries of its vocabulary are not those of the large model" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "logits_arithmetic"}, "method: unknown fusion method 'logits_arithmetic'; did you mean"),
        ({"parameters": {"step": 3}}, r"parameters\.step: unknown key"),
        ({"method": "logit_arithmetic", "parameters": {"alpha": {"tined": 1}}}, r"parameters\.alpha\.tined: not an"),
        ({"parameters": {"experts": "all", "steps": 30_000}}, r"parameters\.steps: 30,001 points at every step"),
        ({"experts": {}}, "experts: "),
        ({"temperature": -1}, "temperature: "),
    ],
)
def test_bad_specs(change, message, folders):
    with pytest.raises(SpecError, match=message):
        FusedModel(spec_of(folders, **change))


def test_prompts_from_files_and_from_the_caller(folders, tmp_path, capsys):
    rows = [{"prompt": "Once", "completion": "zz"}, {"prompt": "Once"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = spec_of(folders, prompts=str(tmp_path / "rows.jsonl"), max_tokens=3)
    result = fuse_logits(spec, tmp_path / "out", quiet=True)
    assert result.numbers["right"] == 0
    assert len(result.answers) == 2
    assert result.answers[0] == result.answers[1]
    written = json.loads((tmp_path / "out" / "answers.json").read_text())
    assert written["answers"][0]["text"] == result.numbers["answers"][0]
    with pytest.raises(OutputError, match="exists already"):
        fuse_logits(spec, tmp_path / "out", quiet=True)
    given = fuse_logits(spec, prompts=["Once", [{"role": "user", "content": "Once"}]], quiet=True)
    assert given.numbers["answers"][0] == result.numbers["answers"][0]
    assert "right" not in given.numbers
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    assert main(["route", "fuse", str(tmp_path / "spec.yaml"), "--prompt", "Once", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"] == result.numbers["answers"][:1]
    with pytest.raises(SpecError, match="prompts: nothing is asked"):
        fuse_logits(spec_of(folders))
    with pytest.raises(RequestError, match="the prompt is empty"):
        fuse_logits(spec_of(folders), prompts=[""], quiet=True)
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError):
        fuse_logits(spec, quiet=True)


def test_it_is_a_model_of_a_cascade(folders):
    model = FusedModel(spec_of(folders, max_tokens=4))
    answer = Cascade([model], confidence, 0.0, abstain=0.0)("Once")
    assert answer.text == model.answer("Once").text
    assert 0 < answer.stages[0].reliability <= 1
    withheld = Cascade([model], confidence, 0.0, abstain=1.0)("Once")
    assert withheld.text is None
