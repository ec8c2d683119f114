"""Distributions against a plain computation and transformers' own; draws that depend on the seed alone."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from toolkit.errors import RequestError
from toolkit.serving.filters import probabilities
from toolkit.serving.penalties import Penalties
from toolkit.serving.request import Request, Sampling
from toolkit.serving.sampling import Sampler

GRID = [
    Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature, top_k, top_p, min_p in itertools.product((0.5, 1.0, 2.0), (0, 1, 5), (1.0, 0.7, 1e-6), (0, 0.3, 1))
]


def random_logits(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def by_hand(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """One filter after the other, each on the normalised distribution that the one before it left."""
    p = np.exp(logits / sampling.temperature - (logits / sampling.temperature).max())
    if sampling.top_k:
        p[np.argsort(-logits)[sampling.top_k :]] = 0
    p /= p.sum()
    kept, total = [], 0.0
    for i in np.argsort(-p, kind="stable"):
        kept.append(i)
        total += p[i]
        if total >= sampling.top_p:
            break
    q = np.zeros_like(p)
    q[kept] = p[kept]
    q /= q.sum()
    q[q < sampling.min_p * q.max()] = 0
    return q / q.sum()


def test_distributions_of_a_batch_against_a_loop():
    logits = random_logits(len(GRID), 40)
    got = probabilities(logits, GRID)
    for row, own, sampling in zip(got.numpy(), logits.numpy(), GRID, strict=True):
        np.testing.assert_allclose(row, by_hand(own, sampling), rtol=1e-9, atol=1e-12, err_msg=str(sampling))


def test_distributions_against_transformers():
    logits = random_logits(len(GRID), 300, seed=2)
    got = probabilities(logits, GRID)
    for row, own, sampling in zip(got, logits, GRID, strict=True):
        warpers = [TemperatureLogitsWarper(sampling.temperature)]
        warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
        warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
        warpers += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
        scores = own[None]
        for warper in warpers:
            scores = warper(torch.zeros(1, 1, dtype=torch.long), scores)
        torch.testing.assert_close(row, scores.softmax(-1)[0], rtol=1e-9, atol=1e-12)


def test_the_order_of_the_filters_shows():
    """Top-p of what top-k left, and min-p of that: any other order keeps other tokens here."""
    p = np.array([0.4, 0.3, 0.2, 0.1])
    got = probabilities(torch.from_numpy(np.log(p))[None], [Sampling(temperature=1.0, top_k=2, top_p=0.56)])
    np.testing.assert_allclose(got[0], [1, 0, 0, 0], atol=1e-12)  # 0.4 of 0.7 is 0.571; top-p first would keep two


@pytest.mark.parametrize("alone", [0, 17, 80])
def test_a_row_of_a_batch_is_the_row_alone(alone):
    logits = random_logits(len(GRID), 1000, seed=3).float()
    together = probabilities(logits, GRID)[alone]
    assert torch.equal(together, probabilities(logits[alone : alone + 1], [GRID[alone]])[0])


PROMPT, OUTPUT = [3, 5, 5, 9], [5, 7, 7, 7, 2]


def penalised(sampling: Sampling, logits: torch.Tensor) -> torch.Tensor:
    request = Request("r", PROMPT, None, sampling, output=OUTPUT)
    return Penalties(request, logits).apply(logits)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_repetition_penalty_is_transformers_own(penalty):
    logits = random_logits(40)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([PROMPT + OUTPUT]), logits[None])[0]
    got = penalised(Sampling(repetition_penalty=penalty), logits)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert not torch.equal(got, logits)


def test_logit_bias_is_transformers_sequence_bias_and_comes_before_the_repetition_penalty():
    logits = random_logits(40)
    bias = {5: 20.0, 11: -30.0, 39: 1.5}
    expected = SequenceBiasLogitsProcessor({(k,): v for k, v in bias.items()})(
        torch.tensor([PROMPT + OUTPUT]), logits[None].clone()
    )
    torch.testing.assert_close(penalised(Sampling(logit_bias=bias), logits), expected[0], rtol=1e-12, atol=0)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([PROMPT + OUTPUT]), expected)
    got = penalised(Sampling(logit_bias=bias, repetition_penalty=1.7), logits)
    torch.testing.assert_close(got, expected[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize(("presence", "frequency"), [(0.7, 0.0), (0.0, 0.4), (-1.5, 0.9)])
def test_presence_and_frequency_penalties_are_openais_formula_over_the_answer(presence, frequency):
    logits = random_logits(40).numpy()
    expected = logits.copy()
    for token in range(40):
        count = OUTPUT.count(token)
        expected[token] -= count * frequency + (count > 0) * presence
    sampling = Sampling(presence_penalty=presence, frequency_penalty=frequency)
    np.testing.assert_allclose(penalised(sampling, torch.from_numpy(logits)), expected, rtol=1e-12)


def test_penalties_follow_an_answer_as_it_grows():
    sampling = Sampling(presence_penalty=0.3, frequency_penalty=0.5, repetition_penalty=1.2)
    request = Request("r", PROMPT, None, sampling)
    logits = random_logits(40)
    growing = Penalties(request, logits)
    for token in OUTPUT:
        growing.apply(logits)
        request.output.append(token)
    torch.testing.assert_close(growing.apply(logits), penalised(sampling, logits), rtol=1e-12, atol=0)


def test_penalties_ignore_ids_that_the_head_lacks():
    request = Request("r", [3, 60], None, Sampling(repetition_penalty=2.0))
    logits = random_logits(40)
    expected = logits.clone()
    expected[3] = logits[3] * 2 if logits[3] < 0 else logits[3] / 2
    torch.testing.assert_close(Penalties(request, logits).apply(logits), expected)


def test_greedy_takes_the_largest_after_bias_and_penalties():
    logits = torch.tensor([[3.0, 2.5, 1.0, -1.0]] * 4)
    requests = [
        Request("plain", [1]),
        Request("bias", [1], None, Sampling(logit_bias={3: 9.0})),
        Request("repetition", [0], None, Sampling(repetition_penalty=3.0)),
        Request("frequency", [3], None, Sampling(frequency_penalty=1.0), output=[0, 1, 1]),
    ]
    before = logits.clone()
    assert Sampler().sample(requests, logits) == [0, 3, 1, 0]
    assert torch.equal(logits, before), "the logits are still needed for log-probabilities"


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
        ({"max_tokens": -1}, "max_tokens must be at least 0, not -1"),
        ({"temperature": -1}, "temperature must be finite and at least 0, not -1"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"temperature": float("inf")}, "temperature must be finite"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1"),
        ({"min_p": 1.1}, "min_p must be from 0 to 1"),
        ({"min_p": float("nan")}, "min_p must be from 0 to 1"),
        ({"presence_penalty": 2.1}, "presence_penalty must be from -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty must be from -2 to 2"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must be from 0\.01 to 100"),
        ({"logit_bias": {3: 101.0}}, "logit_bias must be token ids with values from -100 to 100"),
        ({"logit_bias": {-3: 1.0}}, "logit_bias must be token ids"),
        ({"logprobs": 21}, "logprobs must be from 0 to 20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must be from 0 to 20"),
        ({"seed": 2**64}, "seed must be from -9223372036854775808 to 18446744073709551615"),
        ({"seed": -(2**63) - 1}, "seed must be from"),
        ({"stop": "END"}, "stop must be a list of texts, not 'END'"),
    ],
)
def test_values_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(RequestError, match=message):
        Sampling(**wrong)


def test_every_seed_that_is_taken_draws_its_own():
    logits = torch.zeros(1, 10_000)

    def draw(seed: int) -> tuple[int | None, ...]:
        sampler, request = Sampler(), Request("r", [1], None, Sampling(temperature=1.0, seed=seed))
        return tuple(sampler.sample([request], logits)[0] for _ in range(3))

    seeds = [-(2**63), -1, 0, 1, 2, 2**64 - 2]
    assert len({draw(seed) for seed in seeds}) == len(seeds)
    assert draw(-1) == draw(-1)


def test_draws_depend_on_the_seed_and_not_on_the_company():
    logits = random_logits(5, 50, seed=0).float()
    steps = [logits + i for i in range(4)]

    def draw(companions: int) -> list[int | None]:
        sampler = Sampler()
        mine = Request("mine", [1], None, Sampling(temperature=1.0, seed=7, min_p=0.01, presence_penalty=0.5))
        others = [
            Request(str(i), [1], None, Sampling(temperature=i * 1.0, seed=i, top_k=i, top_p=1 - i / 9))
            for i in range(companions)
        ]
        return [sampler.sample([*others, mine], torch.cat([s[:companions], s[4:]]))[-1] for s in steps]

    assert draw(0) == draw(1) == draw(3) == draw(4)
    assert len(set(draw(0))) > 1


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, seed=0),
        Sampling(temperature=0.6, top_k=9, seed=1),
        Sampling(temperature=1.5, top_p=0.8, seed=2),
        Sampling(temperature=1.2, min_p=0.1, seed=3),
        Sampling(temperature=1.0, top_k=12, top_p=0.9, min_p=0.05, seed=4),
    ],
)
def test_draws_follow_the_distribution(sampling):
    """Pearson's chi-squared of 20,000 draws by 200 seeds in turn; they are fixed, so this passes always or never."""
    logits = random_logits(30, seed=5)
    expected = by_hand(logits.numpy(), sampling) * 20_000
    requests = [Request(str(i), [1], None, replace(sampling, seed=1000 * (sampling.seed or 0) + i)) for i in range(200)]
    sampler, rows = Sampler(), logits.float().expand(200, -1)
    counts = np.bincount(np.ravel([sampler.sample(requests, rows) for _ in range(100)]).astype(int), minlength=30)
    assert counts[expected == 0].sum() == 0
    rare = (expected > 0) & (expected < 5)  # pooled, as the test presupposes five of each
    observed, wanted = (
        np.append(x[expected >= 5], x[rare].sum()) if rare.any() else x[expected >= 5] for x in (counts, expected)
    )
    assert stats.chisquare(observed, wanted).pvalue > 0.01


@pytest.mark.parametrize("wanted", [1, 2, 3, 777, 54_321, 100_000])
def test_unlikely_tokens_behind_a_likely_one_are_told_apart(wanted):
    """Each has a probability of 1e-8, below the spacing of float32 numbers near one."""
    logits = torch.zeros(1, 100_001)
    logits[0, 0] = math.log(99_900_000)
    weights = torch.softmax(logits, -1)[0].numpy().astype(np.float64)
    sampler, request = Sampler(), Request("r", [1], None, Sampling(temperature=1.0))
    number = (weights[:wanted].sum() + weights[wanted] / 2) / weights.sum()
    sampler._generator(request).random = lambda: number
    assert sampler.sample([request], logits) == [wanted]


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_tokens_that_can_come(number):
    sampler, request = Sampler(), Request("r", [1], None, Sampling(temperature=1.0, top_k=3))
    sampler._generator(request).random = lambda: number
    logits = torch.tensor([[-9.0, -8.0, 1.0, 2.0, 1.5, -7.0, -6.0]])
    assert sampler.sample([request], logits) == [2 if number == 0 else 4]
