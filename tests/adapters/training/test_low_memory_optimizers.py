"""Optimizers of little memory: torch's own AdamW, autograd and formulas in double precision are the oracles."""

from __future__ import annotations

import json
from math import ceil

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from toolkit.adapters.parts import parts_of
from toolkit.adapters.spec import TrainSpec
from toolkit.adapters.train import train
from toolkit.adapters.training._adam import LeanAdamW, basis_of, lift, normalised_gradients, project
from toolkit.adapters.training._blocks import dequantize, dynamic_values, quantize
from toolkit.data.rows import write_rows


def steps(optimizer_of, shape, count: int = 12, dtype=torch.float32) -> list[Tensor]:
    """Follow an optimizer over gradients that are drawn anew in every step."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape, dtype=dtype))
    optimizer, found = optimizer_of([p]), []
    for _ in range(count):
        p.grad = torch.randn(shape, dtype=dtype) * 0.3
        optimizer.step()
        found.append(p.detach().clone())
    return found


@pytest.mark.system("eight_bit_optim")
@pytest.mark.parametrize("signed", [True, False])
def test_values_are_midpoints_of_decades(signed):
    found = dynamic_values(signed)
    wanted = {0.0, 1.0}
    for decade in range(7):
        edges = np.linspace(0.1, 1, (64 if signed else 128) // 2**decade + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0**-decade
        wanted |= set(middles) | (set(-middles) if signed else set())
    np.testing.assert_allclose(found.numpy(), sorted(wanted), rtol=1e-6)
    assert len(found) == 256
    assert float(found.max()) == 1
    assert float(found.min()) == pytest.approx(-0.99296875 if signed else 0)


@pytest.mark.system("eight_bit_optim")
def test_codes_are_the_nearest_values():
    torch.manual_seed(0)
    x = torch.randn(700) * torch.logspace(-6, 0, 700)
    codes, largest = quantize(x, 128, signed=True)
    assert codes.dtype == torch.uint8
    assert (codes.shape, largest.shape) == ((700,), (6,))
    for i in range(700):
        share = x[i] / x[i // 128 * 128 : (i // 128 + 1) * 128].abs().max()
        distances = (dynamic_values(True).double() - share.double()).abs()
        assert float(distances[int(codes[i])]) <= float(distances.min()) + 1e-8


@pytest.mark.system("eight_bit_optim")
def test_an_outlier_changes_its_own_block_alone():
    torch.manual_seed(0)
    x = torch.randn(1000)
    y = x.clone()
    y[300] = 1000.0
    a, b = (dequantize(*quantize(v, 256, signed=True), 256, signed=True) for v in (x, y))
    changed = (a != b).nonzero().flatten()
    assert ((changed >= 256) & (changed < 512)).all()
    assert len(changed) > 200
    assert float(b[300]) == 1000


@pytest.mark.system("eight_bit_optim")
def test_round_trips_end_unless_the_largest_entry_is_negative():
    torch.manual_seed(0)
    x = torch.randn(512)
    x[[0, 256]] = 9.0
    once = dequantize(*quantize(x, 256, signed=True), 256, signed=True)
    assert torch.equal(dequantize(*quantize(once, 256, signed=True), 256, signed=True), once)
    x[[0, 256]] = -9.0
    once = dequantize(*quantize(x, 256, signed=True), 256, signed=True)
    assert float(once[0]) == pytest.approx(-9 * 0.99296875), "there is no code for -1"
    zeros = quantize(torch.zeros(10), 4, signed=False)
    assert torch.equal(dequantize(*zeros, 4, signed=False), torch.zeros(10))


@pytest.mark.system("eight_bit_optim")
def test_relative_error_grows_from_the_largest_entry_down():
    """Worst halfway between two neighbours `a < b`, at `(b - a) / (b + a)`; 0.71 at 1e-6, as published."""
    edges = [np.linspace(0.1, 1, 64 // 2**d + 1) for d in range(7)]
    values = np.sort(np.concatenate([(e[1:] + e[:-1]) / 2 * 10.0**-d for d, e in enumerate(edges)] + [np.ones(1)]))
    worst = []
    for decade in range(-6, 0):
        x = torch.cat([torch.logspace(decade, decade + 1, 50_001, dtype=torch.float64).float(), torch.ones(1)])
        back = dequantize(*quantize(x, len(x), signed=True), len(x), signed=True)
        worst.append(float(((back - x).abs() / x)[:-1].max()))
        near = values[max(np.searchsorted(values, 10.0**decade) - 1, 0) : np.searchsorted(values, 10.0 ** (decade + 1))]
        assert worst[-1] == pytest.approx(((near[1:] - near[:-1]) / (near[1:] + near[:-1])).max(), rel=1e-3)
    assert worst[0] == pytest.approx(0.71, abs=0.005)
    assert worst == sorted(worst, reverse=True)


@pytest.mark.system("eight_bit_optim")
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_with_32_bits_the_steps_are_those_of_adamw_to_the_bit(decay):
    mine = steps(lambda p: LeanAdamW(p, 1e-2, weight_decay=decay), (70, 30))
    wanted = steps(lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=decay, foreach=False), (70, 30))
    assert all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True))


@pytest.mark.system("eight_bit_optim")
def test_with_8_bits_the_steps_are_close_and_the_state_is_a_quarter():
    for shape in ((100, 50), (63, 63)):
        p = nn.Parameter(torch.ones(shape))
        optimizer = LeanAdamW([p], 1e-2, block=256)
        p.grad = torch.rand(shape)
        optimizer.step()
        n = p.numel()
        kept = sum(v.numel() * v.element_size() for v in optimizer.state[p].values() if isinstance(v, Tensor))
        assert kept == (2 * (n + 4 * ceil(n / 256)) if n >= 4096 else 8 * n), "small tensors keep 32 bits"
    mine = steps(lambda p: LeanAdamW(p, 1e-2, block=256), (100, 50), 20)
    wanted = steps(lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0), (100, 50), 20)
    moved = (wanted[-1] - wanted[0]).norm()
    assert 0 < (mine[-1] - wanted[-1]).norm() < 0.1 * moved


@pytest.mark.system("eight_bit_optim")
def test_one_step_is_dequantise_update_requantise():
    """Written out in float64 over numpy, of the same codes."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(80, 60))
    optimizer = LeanAdamW([p], 0.1, block=100)
    gradients = [torch.randn(80, 60) for _ in range(3)]
    w, m, v = p.detach().double().flatten(), torch.zeros(4800), torch.zeros(4800)
    for t, gradient in enumerate(gradients, 1):
        p.grad = gradient
        optimizer.step()
        g = gradient.flatten()
        first, second = 0.9 * m.double() + 0.1 * g.double(), 0.999 * v.double() + 0.001 * g.double() ** 2
        w = w - 0.1 * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        m = dequantize(*quantize(first, 100, signed=True), 100, signed=True)
        v = dequantize(*quantize(second, 100, signed=False), 100, signed=False)
    # A code may flip where float32 and float64 round to different sides of a midpoint.
    assert float(((p.detach().flatten() - w).abs() < 1e-4).double().mean()) > 0.999


def test_a_state_survives_a_file(tmp_path):
    def made(p: nn.Parameter) -> LeanAdamW:
        return LeanAdamW([{"params": [p], "rank": 4, "gap": 3, "normalised": True}], 1e-2, block=64, min_size=0)

    torch.manual_seed(0)
    gradients = [torch.randn(40, 30, dtype=torch.bfloat16) for _ in range(8)]
    p = nn.Parameter(torch.randn(40, 30).bfloat16())
    optimizer = made(p)
    for i, gradient in enumerate(gradients):
        if i == 4:
            torch.save([optimizer.state_dict(), p.detach().clone()], tmp_path / "state.pt")
        p.grad = gradient
        optimizer.step()
    state, value = torch.load(tmp_path / "state.pt", weights_only=True)
    q = nn.Parameter(value)
    other = made(q)
    other.load_state_dict(state)
    for gradient in gradients[4:]:
        q.grad = gradient
        other.step()
    assert torch.equal(p, q)


@pytest.mark.system("gradnormlorp")
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_projection_onto_everything_is_the_identity(shape):
    torch.manual_seed(0)
    g = torch.randn(shape, dtype=torch.float64)
    basis = basis_of(g, min(shape))
    torch.testing.assert_close(lift(project(g, basis), basis, g.shape), g, rtol=1e-12, atol=1e-12)
    u, s, v = np.linalg.svd(g.numpy())
    best = (u[:, :2] * s[:2]) @ v[:2]
    basis = basis_of(g, 2)
    np.testing.assert_allclose(lift(project(g, basis), basis, g.shape).numpy(), best, atol=1e-12)


@pytest.mark.system("gradnormlorp")
def test_gradients_of_magnitude_and_direction_are_autograds():
    torch.manual_seed(0)
    m, v = torch.randn(7, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    target = torch.randn(7, 4, dtype=torch.float64)
    m.requires_grad_()
    v.requires_grad_()
    weight = m[:, None] * v / v.norm(dim=1, keepdim=True)
    weight.retain_grad()
    ((weight - target) ** 2).sum().backward()
    assert weight.grad is not None
    length = v.detach().norm(dim=1)
    of_m, of_v = normalised_gradients(weight.grad, v.detach() / length[:, None], m.detach(), length)
    torch.testing.assert_close(of_m, m.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(of_v, v.grad, rtol=1e-12, atol=1e-12)
    assert float((of_v * v.detach()).sum(1).abs().max()) < 1e-12, "tangent"


@pytest.mark.system("gradnormlorp")
@pytest.mark.parametrize("eps", [1e-8, 1e8])
def test_at_full_rank_it_is_the_optimizer_of_weight_normalisation(eps):
    """Autograd on magnitudes and directions of their own; a huge epsilon turns Adam into gradient descent."""
    torch.manual_seed(0)
    w, target = torch.randn(6, 9, dtype=torch.float64), torch.randn(6, 9, dtype=torch.float64)
    rate = 0.02 if eps < 1 else 0.05 * eps
    p = nn.Parameter(w.clone())
    mine = LeanAdamW([p], rate, weight_decay=0.01 / rate, betas=(0.5, 0.9), eps=eps, rank=6, normalised=True)
    m, v = nn.Parameter(w.norm(dim=1)), nn.Parameter(w.clone())
    groups = [{"params": [m], "weight_decay": 0.01 / rate}, {"params": [v], "weight_decay": 0.0}]
    wanted = torch.optim.AdamW(groups, rate, betas=(0.5, 0.9), eps=eps)
    for _ in range(60):
        for optimizer in (mine, wanted):
            optimizer.zero_grad()
        ((p - target) ** 2).sum().backward()
        ((m[:, None] * v / v.norm(dim=1, keepdim=True) - target) ** 2).sum().backward()
        mine.step()
        wanted.step()
        torch.testing.assert_close(p, m[:, None] * v / v.norm(dim=1, keepdim=True), rtol=1e-8, atol=1e-8)
    assert (m < 0).any() or eps < 1, "magnitudes may change their sign"
    state = mine.state[p]
    torch.testing.assert_close(state["magnitude"], m.detach(), rtol=1e-8, atol=1e-8)


@pytest.mark.system("gradnormlorp")
def test_moments_have_the_rank_and_zero_rows_no_direction():
    for shape, kept in (((40, 24), (40, 3)), ((24, 40), (3, 40))):
        p = nn.Parameter(torch.ones(shape))
        optimizer = LeanAdamW([p], 1e-2, rank=3, normalised=True)
        p.grad = torch.randn(shape)
        optimizer.step()
        state = optimizer.state[p]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == kept
        bytes_ = sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, Tensor))
        assert bytes_ == 4 * (2 * 3 * 40 + 24 * 3 + 4 * shape[0]), "basis; magnitude, length and its moments"
    zeros = steps(lambda p: LeanAdamW(p, 1e-2, normalised=True), (8, 6), 1)[0]
    p = nn.Parameter(torch.zeros(8, 6))
    optimizer = LeanAdamW([p], 1e-2, normalised=True)
    p.grad = torch.ones(8, 6)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((8, 6), -0.01))
    assert zeros.isfinite().all()


@pytest.mark.system("gradnormlorp")
@pytest.mark.parametrize("normalised", [False, True])
def test_a_planted_rank_one_regression_is_learned_as_by_adamw(normalised):
    torch.manual_seed(0)
    start, x = torch.randn(12, 10), torch.randn(200, 10)
    y = x @ (start + torch.outer(torch.randn(12), torch.randn(10))).T
    losses = []
    for low in (False, True):
        p = nn.Parameter(start.clone())
        settings = {"rank": 2, "gap": 10, "normalised": normalised} if low else {}
        optimizer = LeanAdamW([p], 0.1, **settings)
        loss = torch.zeros(())
        for step in range(1200):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 1200)
            p.grad = None
            loss = ((x @ p.T - y) ** 2).mean()
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0] + 1e-4 * float((y**2).mean())


def test_galore_is_its_algorithm_in_double_precision():
    """The paper's algorithm in numpy: a basis by SVD every third step, moments kept across."""
    torch.manual_seed(0)
    w = torch.randn(9, 14, dtype=torch.float64)
    gradients = [torch.randn(9, 14, dtype=torch.float64) for _ in range(8)]
    p = nn.Parameter(w.clone())
    optimizer = LeanAdamW([p], 0.1, weight_decay=0.02, rank=3, gap=3, scale=0.25)
    x, m, v = w.numpy().copy(), np.zeros((3, 14)), np.zeros((3, 14))
    basis = np.zeros((9, 3))
    for t, gradient in enumerate(gradients, 1):
        p.grad = gradient
        optimizer.step()
        g = gradient.numpy()
        if t % 3 == 1:
            basis = np.linalg.svd(g)[0][:, :3]
            basis *= np.sign((basis * optimizer.state[p]["basis"].numpy()).sum(0))  # a singular vector has two signs
        r = basis.T @ g
        m, v = 0.9 * m + 0.1 * r, 0.999 * v + 0.001 * r * r
        step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        x = x * (1 - 0.1 * 0.02) - 0.1 * 0.25 * basis @ step
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-9, atol=1e-9)


def method_of(method: str, **fields):
    training = {"methods": {"method": method, **fields}}
    (made,) = parts_of(TrainSpec(base="x", data={"train": ["a"]}, training=training)).methods  # pyright: ignore[reportArgumentType]
    return made


def test_methods_choose_their_parameters():
    model = tiny.llama()
    groups = [{"params": list(model.parameters()), "weight_decay": 0.1}]
    rank = {"galore": "rank", "gradnormlorp": "rank"}
    for name, key in rank.items():
        made = method_of(name, rank=4).optimizer(model, groups, 0.1)
        low = {id(p) for g in made.param_groups if g[key] for p in g["params"]}
        linear = {id(p) for n, p in model.named_parameters() if "proj" in n}
        assert low == linear, "neither norms nor embeddings nor the head"
        assert sum(len(g["params"]) for g in made.param_groups) == len(list(model.parameters()))
        assert all(g["weight_decay"] == 0.1 for g in made.param_groups)
    made = method_of("eight_bit_optim").optimizer(model, groups, 0.1)
    whole = [p for g in made.param_groups if g["block"] is None for p in g["params"]]
    assert [p is model.model.embed_tokens.weight for p in whole] == [True]


class StopError(Exception):
    """Ends a run as a kill does: what is on the disk stays there."""


@pytest.mark.parametrize("method", ["eight_bit_optim", "galore", "gradnormlorp"])
def test_runs_learn_with_less_and_resume_to_the_same_bytes(base, tmp_path, monkeypatch, method):
    write_rows(tmp_path / "a.jsonl", [{"prompt": f"{i} ", "completion": "yes"} for i in range(16)])
    fields = {} if method == "eight_bit_optim" else {"rank": 4, "gap": 2, "bits": 8}
    training = {"max_steps": 12, "batch_size": 8, "learning_rate": 0.003, "save_steps": 6, "logging_steps": 1}
    spec = {"base": str(base), "adapter": {"method": "full"}, "data": {"train": str(tmp_path / "a.jsonl")}}
    spec |= {"training": training | {"methods": {"method": method, **fields}}, "device": "cpu"}
    done = train(spec, tmp_path / "done", quiet=True)
    assert done.numbers["optimizer_bytes"] < 0.55 * 8 * done.numbers["trainable_parameters"]
    losses = [json.loads(line)["loss"] for line in (done.path / "metrics.jsonl").read_text().splitlines()[:12]]
    assert losses[-1] < 0.7 * losses[0]

    def stop(*_: object, **__: object) -> None:
        raise StopError

    with monkeypatch.context() as patched:
        old = LeanAdamW.step
        calls = iter(range(100))
        patched.setattr(LeanAdamW, "step", lambda self, c=None: stop() if next(calls) == 8 else old(self, c))
        with pytest.raises(StopError):
            train(spec, tmp_path / "again", quiet=True)
    again = train(spec, tmp_path / "again", quiet=True, resume=True)
    assert (again.path / "model.safetensors").read_bytes() == (done.path / "model.safetensors").read_bytes()
