"""Random traffic through the whole engine: whatever else happens, each answer is that of the request run alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.serving.variants import UNMERGED, Oracle
from toolkit.serving.engine import Engine
from toolkit.serving.request import Sampling
from toolkit.serving.spec import Limits
from toolkit.serving.ticket import Ticket

MOST = 1_000
"""One answer in as many may differ where the two best logits are as good as equal."""

ALONE = ("dora", *UNMERGED, "arrow", "pair")
"""What cannot be combined; the last two are token routers."""

CLOSE = 1e-4
"""How close, as a share of the logits' spread."""


@dataclass
class Count:
    """What the traffic met, so that a run in which nothing happened is seen."""

    answers: int = 0
    cancelled: int = 0
    different: list[str] = field(default_factory=list)


def random_model(rng: random.Random, names: list[str]) -> str:
    if rng.random() < 0.75:
        return rng.choice(["base", *names])
    combined = [name for name in names if name not in ALONE]
    parts = rng.sample(combined, rng.choice([2, 2, 3]))
    return "+".join(f"{part}:{rng.choice([0.3, 0.5, 1, -0.4])}" for part in parts)


def is_its_own(oracle: Any, name: str, prompt: list[int], output: list[int]) -> bool:
    """Tell whether every token is the likeliest after those before it, or as likely as that but for rounding."""
    with torch.inference_mode():
        logits = oracle.model(name)(torch.tensor([prompt + output])).logits[0, -len(output) - 1 : -1].float()
    best, chosen = logits.max(dim=-1).values, logits.gather(1, torch.tensor(output)[:, None])[:, 0]
    spread = logits.max(dim=-1).values - logits.min(dim=-1).values
    return bool((best - chosen <= CLOSE * spread).all())


def drive(engine: Engine, oracle: Any, names: list[str], count: int, rng: random.Random) -> Count:
    """Send requests in bursts, cancel some, register and remove an adapter now and then; check after every step."""
    met, alive = Count(), {}
    openings = [[rng.randrange(256) for _ in range(rng.choice([5, 20, 40]))] for _ in range(4)]
    models = [random_model(rng, names) for _ in range(24)]
    sent = 0
    while sent < count or alive:
        for _ in range(rng.choice([0, 0, 1, 2, 6])):
            if sent < count:
                sent += 1
                name = rng.choice(models)
                opening = rng.choice([*openings, []])
                prompt = opening + [rng.randrange(256) for _ in range(rng.randint(1, 12))]
                sampling = Sampling(max_tokens=rng.randint(1, 24), ignore_eos=True)
                options: dict[str, Any] = {"key": rng.choice("xy"), "priority": rng.choice([0, 0, 0, 0, 3])}
                alive[engine.submit(prompt, name, sampling, **options)] = name
        if alive and rng.random() < 0.03:
            gone: Ticket = rng.choice(list(alive))
            engine.cancel(gone)
            del alive[gone]
            met.cancelled += 1
        engine.step()
        engine.check()
        for ticket in [t for t in alive if t.request.finished]:
            name, answer = alive.pop(ticket), ticket.answer()
            met.answers += 1
            if not is_its_own(oracle, name, ticket.request.prompt, answer.tokens):
                met.different.append(name)
    return met


LIMITS = {
    "tiny pool": Limits(max_requests=6, max_batch_tokens=24, page_size=4, cache_tokens=400),
    "swap": Limits(max_requests=8, max_batch_tokens=16, page_size=3, cache_tokens=330, swap_bytes=10_000_000),
    "roomy": Limits(max_requests=16, max_batch_tokens=256, page_size=8),
}


def check(kind: str, count: int, seed: int, base: Any, variants: dict[str, Any], oracle: Oracle) -> None:
    rng = random.Random(seed)
    with Engine(str(base), variants, limits=LIMITS[kind]) as engine:
        met = drive(engine, oracle, list(variants), count, rng)
        assert not met.different, f"{len(met.different)} of {met.answers} answers differ: {met.different[:5]}"
        assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_pages
        assert met.answers + met.cancelled == count
        prefixes = engine.scheduler.prefixes
        assert prefixes is not None
        assert prefixes.num_hits > 0, "no prompt began like another"
        if kind != "roomy":
            assert engine.scheduler.num_preemptions > 0, "nobody had to make room"
            assert engine.adapters.num_evicted > 0, "no adapter had to make room"
        if kind == "swap":
            assert engine.scheduler.swap is not None
            assert engine.scheduler.swap.num_moved > 0
            assert engine.scheduler.swap.num_pages == 0


@pytest.mark.system("s_lora")
@pytest.mark.system("fastswitch")
@pytest.mark.system("batchllm")
@pytest.mark.parametrize("kind", LIMITS)
def test_every_answer_under_random_traffic_is_that_of_the_request_alone(kind, base, variants, oracle):
    check(kind, 120, 0, base, variants, oracle)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LIMITS)
def test_two_thousand_requests(kind, base, variants, oracle):
    check(kind, 700, 1, base, variants, oracle)
