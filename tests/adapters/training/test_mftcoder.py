"""Balanced losses are their means by hand, whatever the micro-batches; a small task among large ones is not lost."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from toolkit.adapters.parts import parts_of
from toolkit.adapters.spec import TrainSpec
from toolkit.adapters.train import train
from toolkit.adapters.training import mftcoder
from toolkit.data.collate import Collator
from toolkit.data.pack import Packed, concatenate
from toolkit.data.render import Example
from toolkit.data.rows import write_rows
from toolkit.errors import SpecError

BALANCES = ("tokens", "samples", "task_tokens", "task_samples")


def spec_of(folder, base="x", tasks="ab", validation=True, packing=False, **training) -> dict:
    sources = [{"path": str(folder / f"{task}.jsonl"), "task": task} for task in tasks]
    data = {"train": sources, "packing": packing, "max_length": 100}
    settings = {"max_steps": 3, "batch_size": 8, "learning_rate": 1e-2, "seed": 2} | training
    data |= {"validation": sources} if validation else {}
    return {"base": str(base), "data": data, "training": settings, "device": "cpu"}


def method_of(tmp_path, tasks="ab", **parameters) -> mftcoder.Mftcoder:
    spec = TrainSpec(**spec_of(tmp_path, tasks=tasks, methods={"method": "mftcoder"} | parameters))
    (method,) = parts_of(spec).methods
    return method  # pyright: ignore[reportReturnType]


def loss_of(method, batches: list[list[Packed]], losses: dict[int, list[float]], step=0, data=()) -> float:
    """Sum a method's loss over micro-batches whose token losses are given by the first token of each document."""
    collate = Collator(0, tasks=True)
    made = [collate(batch) for batch in batches]

    def token_losses(model, inputs):
        found = torch.zeros(inputs["labels"].shape[0], inputs["labels"].shape[1] - 1, dtype=torch.float64)
        for i, row in enumerate(inputs["input_ids"]):
            starts = (inputs["position_ids"][i] == 0).nonzero()[:, 0].tolist()
            for start in starts:
                values = losses.get(int(row[start]), [])
                for offset, value in enumerate(values):
                    found[i, start + offset] = value
        return found

    trainer = SimpleNamespace(
        token_losses=token_losses,
        summed=lambda value: value,
        state=SimpleNamespace(global_step=step),
        train_dataset=list(data),
        data_collator=collate,
    )
    method.begin_step(trainer, made)
    return sum(float(method.loss(trainer, None, batch, None)) for batch in made)


def document(key: int, length: int, task: int) -> Example:
    """A document of which `length` tokens are trained."""
    return Example([key, *[1] * length], [-100, *[1] * length], task)


def alone(key: int, length: int, task: int) -> Packed:
    return concatenate([document(key, length, task)])


def expected(balance: str, samples: list[tuple[list[float], int]], weights=(1.0, 1.0), gamma=0.0) -> float:
    """The means by hand: `samples` are the token losses of each, with its task."""
    tokens = [value for values, _ in samples for value in values]
    of_task = {task: [values for values, t in samples if t == task] for _, task in samples}
    if balance == "tokens":
        return float(np.mean(tokens))
    if balance == "samples":
        return float(np.mean([np.mean(values) for values, _ in samples]))
    if balance == "task_tokens":
        means = {task: np.mean([v for values in own for v in values]) for task, own in of_task.items()}
    else:
        means = {
            task: np.mean([(1 - np.mean(np.exp(-np.array(v)))) ** gamma * np.mean(v) for v in own])
            for task, own in of_task.items()
        }
    return float(sum(weights[t] * means[t] for t in means) / sum(weights[t] for t in means))


SAMPLES = [([0.5, 1.5, 2.0], 0), ([3.0], 0), ([0.25, 0.75], 1), ([2.0] * 5, 0), ([1.0, 4.0, 0.1, 0.2], 1)]


def rows_of(samples) -> tuple[list[Packed], dict[int, list[float]]]:
    rows = [alone(2 + i, len(values), task) for i, (values, task) in enumerate(samples)]
    return rows, {2 + i: values for i, (values, _) in enumerate(samples)}


@pytest.mark.system("mftcoder")
@pytest.mark.parametrize("balance", [*BALANCES, "focal"])
def test_losses_are_the_means_by_hand_in_any_micro_batches(balance, tmp_path):
    rows, losses = rows_of(SAMPLES)
    parameters = {"balance": balance, "weights": {"b": 3.0}} | ({"gamma": 1.5} if balance == "focal" else {})
    wanted = expected(balance, SAMPLES, (1.0, 3.0), gamma=1.5 if balance == "focal" else 0.0)
    for batches in ([rows], [rows[:2], rows[2:]], [[row] for row in rows]):
        assert loss_of(method_of(tmp_path, **parameters), batches, losses) == pytest.approx(wanted, rel=1e-7)
    packed = [
        concatenate([document(2 + i, len(v), t) for i, (v, t) in enumerate(SAMPLES) if t == task]) for task in (0, 1)
    ]
    assert loss_of(method_of(tmp_path, **parameters), [packed], losses) == pytest.approx(wanted, rel=1e-7)


@pytest.mark.system("mftcoder")
def test_balances_coincide_where_all_is_equal_and_differ_elsewhere(tmp_path):
    equal = [([0.5, 1.5], 0), ([3.0, 1.0], 0), ([0.25, 0.75], 1), ([2.0, 9.0], 1)]
    rows, losses = rows_of(equal)
    found = [loss_of(method_of(tmp_path, balance=b), [rows], losses) for b in BALANCES]
    assert found == pytest.approx([found[0]] * 4, rel=1e-7)
    rows, losses = rows_of(SAMPLES)
    found = [loss_of(method_of(tmp_path, balance=b), [rows], losses) for b in BALANCES]
    assert len({round(value, 4) for value in found}) == 4
    focal = {"balance": "focal", "gamma": 0.0}
    assert loss_of(method_of(tmp_path, **focal), [rows], losses) == pytest.approx(found[3], rel=1e-7)


@pytest.mark.system("mftcoder")
def test_copies_of_one_task_move_token_means_alone(tmp_path):
    copied = SAMPLES + [s for s in SAMPLES if s[1] == 1] * 3
    (rows, losses), (more, all_losses) = rows_of(SAMPLES), rows_of(copied)
    before = [loss_of(method_of(tmp_path, balance=b), [rows], losses) for b in BALANCES]
    after = [loss_of(method_of(tmp_path, balance=b), [more], all_losses) for b in BALANCES]
    assert abs(after[0] - before[0]) > 0.01
    assert after[2:] == pytest.approx(before[2:], rel=1e-7)


@pytest.mark.system("mftcoder")
def test_one_task_alone_is_the_mean_over_its_tokens_or_samples(tmp_path):
    rows, losses = rows_of([(values, 0) for values, _ in SAMPLES])
    found = dict(
        zip(BALANCES, (loss_of(method_of(tmp_path, balance=b), [rows], losses) for b in BALANCES), strict=True)
    )
    assert found["task_tokens"] == pytest.approx(found["tokens"], rel=1e-7)
    assert found["task_samples"] == pytest.approx(found["samples"], rel=1e-7)


@pytest.mark.parametrize("balance", ["task_tokens", "task_samples"])
def test_over_all_data_an_epoch_adds_up_to_the_balanced_loss(balance, tmp_path):
    """Fifty rows of one task and one of the other, four at a time: most steps have none of the rare task."""
    rng = np.random.default_rng(0)
    samples = [(rng.random(1 + i % 4).tolist(), 0) for i in range(50)] + [([5.0, 7.0], 1)]
    rows, losses = rows_of(samples)
    method = method_of(tmp_path, balance=balance, over="data")
    count = (lambda batch: sum(len(r.tokens) - 1 for r in batch)) if balance == "task_tokens" else len
    batches = [rows[i : i + 4] for i in range(0, 51, 4)]
    total = sum(loss_of(method, [batch], losses, data=rows) * count(batch) for batch in batches) / count(rows)
    assert total == pytest.approx(expected(balance, samples), rel=1e-6)
    of_steps = method_of(tmp_path, balance=balance)
    biased = sum(loss_of(of_steps, [batch], losses) for batch in batches) / len(batches)
    assert biased < 0.6 * total, "where means are over the step, the rare task is in few of them"


def test_slopes_and_scores_are_their_formulas():
    times = np.arange(6)
    losses = np.stack([1 - 0.1 * times, 1 - 0.02 * times, 1 + 0.05 * times], axis=1)
    slope = mftcoder.slopes(losses, 4)
    assert slope.shape == (5, 3)
    np.testing.assert_allclose(slope, np.broadcast_to([-0.1, -0.02, 0.05], (5, 3)), atol=1e-12)
    powers = np.exp(3 * np.array([-0.1, -0.02, 0.05]) / 0.17)
    np.testing.assert_allclose(mftcoder.relative(slope), powers / powers.sum(), rtol=1e-9)
    powers = np.exp(-5 * np.array([-0.1, -0.02, 0.05]) / (5 * np.array([0.1, 0.02, 0.05])))
    np.testing.assert_allclose(mftcoder.absolute(slope), powers / powers.sum(), rtol=1e-9)


def test_coba_turns_from_slow_tasks_to_converging_ones_when_one_diverges():
    score = mftcoder.partial_coba(5.0)
    steady = np.array([[-0.1, -0.02]] * 6)
    np.testing.assert_allclose(score(steady), mftcoder.relative(steady), rtol=1e-9)
    assert score(steady)[1] > score(steady)[0], "the slower one weighs more"
    diverging = np.array([[-0.1, -0.1]] * 5 + [[-0.1, 0.3]])
    worst = np.array([-0.1] * 5 + [0.3])
    powers = np.exp(5.0 * worst / worst.sum())
    share = min(6 * powers[-1] / powers.sum(), 1)
    wanted = share * mftcoder.relative(diverging) + (1 - share) * mftcoder.absolute(diverging)
    np.testing.assert_allclose(score(diverging), wanted, rtol=1e-9)
    assert share < 0.01
    assert score(diverging)[1] < score(diverging)[0]


@pytest.fixture(scope="module")
def lopsided(tmp_path_factory):
    """Two tasks with contrary answers to prompts of their own; one has 50 times the rows of the other."""
    folder = tmp_path_factory.mktemp("lopsided")
    write_rows(folder / "a.jsonl", [{"prompt": f"{i} a: ", "completion": "north"} for i in range(100)])
    write_rows(folder / "b.jsonl", [{"prompt": f"{i} b: ", "completion": "south"} for i in range(2)])
    return folder


@pytest.mark.system("mftcoder")
def test_task_with_a_fiftieth_of_the_data_is_learned_as_well(lopsided, base, tmp_path):
    """Without a balance its loss stays far behind; with one both are learned in the same steps."""
    found = {}
    for name, methods in (("plain", ()), ("balanced", {"method": "mftcoder", "over": "data"})):
        spec = spec_of(lopsided, base, max_steps=52, learning_rate=2e-2, methods=methods)
        spec["data"]["validation"] = [{"path": str(lopsided / "b.jsonl"), "task": "b"}]
        spec["data"]["batches"] = "random"
        found[name] = train(spec, tmp_path / name, quiet=True).numbers["eval_loss"]
    assert found["balanced"] < 0.7 * found["plain"]


@pytest.mark.parametrize("balance", ["task_samples", "coba", "convergence"])
def test_killed_run_goes_on_to_the_same_bytes(balance, lopsided, base, tmp_path, monkeypatch):
    from toolkit.adapters.callbacks import ShowProgress

    measured = {} if balance == "task_samples" else {"warmup_steps": 1}
    methods = {"method": "mftcoder", "balance": balance, "over": "data"} | measured
    spec = spec_of(lopsided, base, max_steps=5, save_steps=3, methods=methods)
    whole = train(spec, tmp_path / "whole", quiet=True).path / "adapter_model.safetensors"

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ShowProgress, "on_step_end", on_step_end)
        with pytest.raises(KeyboardInterrupt):
            train(spec, tmp_path / "resumed", quiet=True)
    resumed = train(spec, tmp_path / "resumed", resume=True, quiet=True).path / "adapter_model.safetensors"
    assert resumed.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": {"method": "mftcoder", "weights": {"c": 2}}}, "weights.c: no task of data.train; they are a, b"),
        ({"methods": {"method": "mftcoder", "balance": "taks"}}, "methods[0].balance: Input should be 'tokens'"),
        ({"methods": "mftcodr"}, "methods[0].method: unknown training method 'mftcodr'; did you mean 'mftcoder'?"),
        (
            {"methods": ["mftcoder", {"method": "power"}], "lr_scheduler": "cosine"},
            "lr_scheduler: training.methods sets",
        ),
        ({"methods": ["restarts", "power"]}, "methods[1]: restarts and power both set the rate; take one of them"),
    ],
)
def test_bad_specs(change, message, tmp_path):
    for task in "ab":
        write_rows(tmp_path / f"{task}.jsonl", [{"prompt": "x", "completion": "y"}])
    with pytest.raises(SpecError) as caught:
        train(spec_of(tmp_path, **change), tmp_path / "out", quiet=True)
    assert message in str(caught.value)


def test_tasks_must_be_named_and_measured(tmp_path):
    spec = spec_of(tmp_path, methods={"method": "mftcoder", "balance": "coba"}, validation=False)
    del spec["data"]["train"][0]["task"]
    with pytest.raises(SpecError) as caught:
        train(spec, tmp_path / "out", quiet=True)
    with pytest.raises(SpecError, match=r"over: data counts all rows, and a stream has no end"):
        streamed = spec_of(tmp_path, methods={"method": "mftcoder", "over": "data"}, validation=False)
        train(streamed | {"data": streamed["data"] | {"streaming": True}}, tmp_path / "out", quiet=True)
    assert "data.train[0].task: required: a training method tells tasks apart" in str(caught.value)
    assert "coba measures every task on data.validation; b has none there" in str(caught.value)
