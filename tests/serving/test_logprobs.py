"""Log-probabilities of answers and prompts are those of the merged model in one ordinary forward pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import tiny
from tests.serving.test_engine import prompts_of
from toolkit.errors import RequestError
from toolkit.serving.engine import Engine
from toolkit.serving.logprobs import token_logprobs
from toolkit.serving.request import Sampling
from toolkit.serving.spec import Limits


def expected_logprobs(model, ids: list[int]) -> torch.Tensor:
    """`[T - 1, V]`: what is known of each token but the first."""
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)


def check_scores(scores, tokens: list[int], expected: torch.Tensor, top: int) -> None:
    assert [score.token for score in scores] == tokens
    for score, row in zip(scores, expected, strict=True):
        assert score.logprob == pytest.approx(row[score.token].item(), abs=2e-4)
        best = row.topk(top)
        np.testing.assert_allclose([value for _, value in score.top], best.values, atol=2e-4)
        np.testing.assert_allclose([row[token] for token, _ in score.top], best.values, atol=2e-4)


def test_against_float64():
    logits = torch.randn(300, 50, generator=torch.Generator().manual_seed(0)) * 5
    tokens = [int(i) % 50 for i in range(0, 2100, 7)]
    check_scores(token_logprobs(logits, tokens, 3), tokens, logits.double().log_softmax(-1), 3)


def test_a_token_that_cannot_come():
    logits = torch.tensor([[0.0, -torch.inf, 1.0]])
    (found,) = token_logprobs(logits, [1], 20)
    assert found.logprob == -torch.inf
    assert [token for token, _ in found.top] == [2, 0, 1]


@pytest.mark.parametrize("budget", [4, 64])
def test_prompts_and_answers_in_a_mixed_batch_equal_the_merged_model(budget, base, loras, tmp_path):
    """Prompts in chunks of several steps, beside requests that ask for nothing of the kind; one adapts the head."""
    head = tiny.save_lora(base, tmp_path / "head", seed=8, target_modules=["lm_head", "q_proj"])
    loras = loras | {"head": head}
    limits = Limits(max_requests=4, max_batch_tokens=budget, page_size=4)
    names = ["base", "dora", "head", "plain"]
    prompts = prompts_of(8, seed=4, longest=30)
    asked = [
        Sampling(max_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=2),
        Sampling(max_tokens=6, ignore_eos=True),
        Sampling(max_tokens=5, ignore_eos=True, logprobs=0, temperature=0.8, seed=1, repetition_penalty=1.3),
        Sampling(max_tokens=0, prompt_logprobs=4),
    ]
    with Engine(str(base), loras, limits=limits) as engine:
        tickets = [engine.submit(p, names[i % 4], asked[(i + i // 4) % 4]) for i, p in enumerate(prompts)]
        while engine.step():
            engine.check()
    for ticket, prompt in zip(tickets, prompts, strict=True):
        answer, sampling = ticket.answer(), ticket.request.sampling
        rows = expected_logprobs(tiny.load_merged(base, loras.get(answer.model)), prompt + answer.tokens)
        assert len(answer.tokens) == sampling.max_tokens
        if sampling.prompt_logprobs is None:
            assert answer.prompt_logprobs == []
        else:
            check_scores(answer.prompt_logprobs, prompt[1:], rows[: len(prompt) - 1], sampling.prompt_logprobs)
        if sampling.logprobs is None:
            assert answer.logprobs == []
        else:
            check_scores(answer.logprobs, answer.tokens, rows[len(prompt) - 1 :], sampling.logprobs)


def test_scoring_a_prompt_generates_nothing(base):
    with Engine(str(base)) as engine:
        ticket = engine.submit("abc", "base", Sampling(max_tokens=0))
        deltas = []
        ticket.request.on_delta = deltas.append
        while engine.step():
            pass
        assert (ticket.answer().text, ticket.answer().finish_reason) == ("", "length")
        assert [(delta.text, delta.finished) for delta in deltas] == [("", "length")]
        engine.check()
        assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_pages


def test_offsets_are_where_a_token_begins_in_the_text(base):
    with Engine(str(base)) as engine:
        bias = {ord(c): 100.0 for c in "é".encode().decode("latin-1")}
        sampling = Sampling(max_tokens=4, logprobs=0, logit_bias=bias, frequency_penalty=2.0, temperature=0)
        (answer,) = engine.generate(["x"], "base", sampling)
        # Bytes that make no character come out when the next are there.
        text = engine.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        assert answer.text == text
        for score, i in zip(answer.logprobs, range(4), strict=True):
            whole = engine.tokenizer.decode(answer.tokens[:i], skip_special_tokens=True).rstrip("\ufffd")
            assert text[: score.offset] == whole[: score.offset]
            assert score.offset <= len(text)


def test_bias_of_a_token_that_the_model_lacks(base):
    with Engine(str(base)) as engine, pytest.raises(RequestError, match="logit_bias names token id 262, but the model"):
        engine.submit("x", "base", Sampling(logit_bias={262: 1.0}))


def test_a_bias_forces_and_forbids_tokens(base):
    with Engine(str(base)) as engine:
        (forced,) = engine.generate(["x"], "base", Sampling(max_tokens=5, logit_bias={ord("q"): 100.0}))
        assert forced.text == "qqqqq"
        (plain,) = engine.generate(["x"], "base", Sampling(max_tokens=1, ignore_eos=True))
        (banned,) = engine.generate(["x"], "base", Sampling(max_tokens=1, logit_bias={plain.tokens[0]: -100.0}))
        assert banned.tokens != plain.tokens


def test_seeded_answers_do_not_depend_on_the_batch(base, loras):
    """Drawn tokens of a request among others are those of the request alone."""
    sampling = Sampling(max_tokens=20, temperature=1.0, top_p=0.9, seed=11, presence_penalty=0.4, ignore_eos=True)
    prompts = prompts_of(6, seed=9, longest=20)
    with Engine(str(base), loras, limits=Limits(max_batch_tokens=16, max_requests=6)) as engine:
        together = [a.tokens for a in engine.generate(prompts, ["base", "dora", "plain"] * 2, sampling)]
        alone = [
            engine.generate([p], m, sampling)[0].tokens
            for p, m in zip(prompts, ["base", "dora", "plain"] * 2, strict=True)
        ]
    assert together == alone
