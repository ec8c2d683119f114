"""Distributions against a plain computation; draws that depend on the seed alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from toolkit.errors import RequestError
from toolkit.serving.request import Request, Sampling
from toolkit.serving.sampling import Sampler, probabilities


def by_hand(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    p = np.exp(logits / temperature - (logits / temperature).max())
    if top_k:
        p[np.argsort(-logits)[top_k:]] = 0
    p /= p.sum()
    kept, total = [], 0.0
    for i in np.argsort(-p, kind="stable"):
        kept.append(i)
        total += p[i]
        if total >= top_p:
            break
    out = np.zeros_like(p)
    out[kept] = p[kept]
    return out / out.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 5])
@pytest.mark.parametrize("top_p", [1.0, 0.7, 1e-6])
def test_distribution(temperature, top_k, top_p):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = probabilities(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    np.testing.assert_allclose(got, by_hand(logits.numpy(), temperature, top_k, top_p), rtol=1e-9, atol=1e-12)


def test_greedy_takes_the_largest():
    logits = torch.randn(3, 20)
    requests = [Request(str(i), [1]) for i in range(3)]
    assert Sampler().sample(requests, logits) == logits.argmax(-1).tolist()


def test_rows_that_are_no_distribution_give_no_token():
    logits = torch.zeros(5, 4)
    logits[1, 2], logits[2, 0], logits[3] = torch.nan, torch.inf, -torch.inf
    logits[4] = torch.tensor([-torch.inf, -torch.inf, 0, -torch.inf])
    for temperature in (0.0, 1.0):
        requests = [Request(str(i), [1], None, Sampling(temperature=temperature)) for i in range(5)]
        tokens = Sampler().sample(requests, logits)
        assert tokens[0] in range(4)
        assert tokens[1:] == [None, None, None, 2]


@pytest.mark.parametrize("temperature", [1e-40, 1e-300, 5e-6])
def test_tiny_temperatures_are_greedy(temperature):
    logits = torch.tensor([[3.0, 90.0, 89.9, -4.0]])
    assert Sampler().sample([Request("r", [1], None, Sampling(temperature=temperature))], logits) == [1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"max_tokens": -3}, "max_tokens must be at least 1, not -3"),
        ({"temperature": -1}, "temperature must be finite and at least 0, not -1"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"temperature": float("inf")}, "temperature must be finite"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1"),
        ({"seed": 2**64}, "seed must be from -9223372036854775808 to 18446744073709551615"),
        ({"seed": -(2**63) - 1}, "seed must be from"),
        ({"stop": "END"}, "stop must be a list of texts, not 'END'"),
    ],
)
def test_values_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(RequestError, match=message):
        Sampling(**wrong)


@pytest.mark.parametrize("seed", [-(2**63), 2**64 - 1])
def test_every_seed_that_is_taken_can_be_drawn_with(seed):
    sampler, request = Sampler(), Request("r", [1], None, Sampling(temperature=1.0, seed=seed))
    assert sampler.sample([request], torch.zeros(1, 3))[0] in range(3)


def test_draws_depend_on_the_seed_and_not_on_the_company():
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    steps = [logits + i for i in range(4)]

    def draw(companions: int) -> list[int]:
        sampler = Sampler()
        mine = Request("mine", [1], None, Sampling(temperature=1.0, seed=7))
        others = [Request(str(i), [1], None, Sampling(temperature=1.0, seed=i)) for i in range(companions)]
        return [sampler.sample([*others, mine], torch.cat([s[:companions], s[4:]]))[-1] for s in steps]

    assert draw(0) == draw(1) == draw(3)
    assert len(set(draw(0))) > 1


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    sampler = Sampler()
    request = Request("r", [1], None, Sampling(temperature=1.0, seed=0))
    counts = np.bincount([sampler.sample([request], logits[None])[0] for _ in range(4000)], minlength=4)
    np.testing.assert_allclose(counts / 4000, torch.softmax(logits, 0), atol=0.03)
