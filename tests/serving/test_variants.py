"""Every kind of variant of a base in the same batch, alone and composed: each answer is that of the merged model."""

from __future__ import annotations

import pytest

from tests.serving.test_engine import ENOUGH, prompts_of, same_but_for_ties
from toolkit.serving.engine import Engine
from toolkit.serving.request import Sampling
from toolkit.serving.spec import Limits

COMPOSED = ["plain:0.6+wide:0.4", "few+rslora:-0.5+patterns:2", "tuned:0.5+plain", "ia3:0.7+few:0.5", "saved:0.5"]


def check(engine, oracle, requests):
    """Compare, and see to it that a variant is not the base, which would make the comparison empty."""
    sampling = Sampling(max_tokens=ENOUGH, ignore_eos=True)
    answers = engine.generate([p for p, _ in requests], [m for _, m in requests], sampling)
    for (prompt, name), answer in zip(requests, answers, strict=True):
        expected = oracle.greedy(name, prompt, ENOUGH)
        assert same_but_for_ties(answer.tokens, expected, oracle.model(name), prompt), name
        assert name == "base" or expected != oracle.greedy("base", prompt, ENOUGH), name
    engine.check()
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_pages


@pytest.mark.system("s_lora")
@pytest.mark.system("blockllm")
@pytest.mark.parametrize(
    "limits", [Limits(), Limits(max_batch_tokens=9, max_requests=5, page_size=3)], ids=["roomy", "tight"]
)
def test_every_kind_in_one_batch(limits, base, variants, oracle):
    names = ["base", *variants, *COMPOSED]
    requests = [(prompt, name) for prompt, name in zip(prompts_of(len(names), seed=9, longest=30), names, strict=True)]
    with Engine(str(base), variants, limits=limits) as engine:
        check(engine, oracle, requests)
