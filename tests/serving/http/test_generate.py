"""What completions and chat completions can ask for, through OpenAI's own client."""

from __future__ import annotations

import time

import numpy as np
import openai
import pytest
import torch

from tests import tiny
from toolkit.serving.engine import Engine
from toolkit.serving.request import Sampling

MESSAGES = [{"role": "user", "content": "Say something."}]
DRAWN = {"temperature": 1.0, "seed": 40, "max_tokens": 12}


def logprob_rows(base, lora, ids: list[int]) -> torch.Tensor:
    """`[T - 1, V]`: what the merged model says of each token but the first."""
    with torch.inference_mode():
        logits = tiny.load_merged(base, lora)(torch.tensor([ids])).logits[0, :-1]
    return logits.double().log_softmax(-1)


def wait_until_idle(engine: Engine) -> None:
    for _ in range(500):
        if not engine.has_work:
            return
        time.sleep(0.01)
    pytest.fail("the engine still has work")


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 0.0},
        {"top_k": 3},
        {"top_p": 0.4},
        {"min_p": 0.3},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 1.9, "temperature": 0.0},
        {"repetition_penalty": 3.0, "temperature": 0.0},
        {"logit_bias": {"97": 7.5, "98": 7}},
        {"ignore_eos": True},
        {"stop_token_ids": list(range(100, 256))},
    ],
    ids=str,
)
def test_every_field_reaches_the_engine(asked, client, base):
    """The same fields given to an engine of its own; and each of them changes the answer."""
    extra = {k: v for k, v in asked.items() if k in ("top_k", "min_p", "repetition_penalty", "ignore_eos")}
    extra |= {k: v for k, v in asked.items() if k == "stop_token_ids"}
    plain = {"model": "base", "prompt": "Once upon", "temperature": 1.5, "max_tokens": 40, "seed": 3}
    named = {k: v for k, v in asked.items() if k not in extra}
    got = client.completions.create(**(plain | named), extra_body=extra).choices[0]
    bias = {int(token): value for token, value in asked.get("logit_bias", {}).items()}
    sampling = {"temperature": 1.5, "max_tokens": 40, "seed": 3} | asked | ({"logit_bias": bias} if bias else {})
    with Engine(str(base)) as own:
        (expected,) = own.generate(["Once upon"], "base", Sampling(**sampling))
        (without,) = own.generate(["Once upon"], "base", Sampling(temperature=1.5, max_tokens=40, seed=3))
    assert (got.text, got.finish_reason) == (expected.text, expected.finish_reason)
    assert expected.tokens != without.tokens or "ignore_eos" in asked


def test_stop_texts_end_an_answer_before_them(client):
    def ask(**more):
        return client.completions.create(model="plain", prompt="abc", temperature=0, max_tokens=30, **more)

    whole = ask(extra_body={"ignore_eos": True}).choices[0].text
    stop = whole[9:11]
    for asked in (stop, [stop, "never there"]):
        got = ask(stop=asked, extra_body={"ignore_eos": True}).choices[0]
        assert (got.text, got.finish_reason) == (whole[: whole.index(stop)], "stop")
        parts = list(ask(stop=asked, stream=True, extra_body={"ignore_eos": True}))
        assert "".join(part.choices[0].text for part in parts) == got.text
        assert parts[-1].choices[0].finish_reason == "stop"


def test_several_answers_are_those_of_consecutive_seeds(client):
    one = [
        client.chat.completions.create(model="dora", messages=MESSAGES, **(DRAWN | {"seed": 40 + i})) for i in range(3)
    ]
    several = client.chat.completions.create(model="dora", messages=MESSAGES, n=3, **DRAWN)
    assert [c.index for c in several.choices] == [0, 1, 2]
    assert [c.message.content for c in several.choices] == [a.choices[0].message.content for a in one]
    assert len({c.message.content for c in several.choices}) == 3
    assert several.usage.prompt_tokens == one[0].usage.prompt_tokens
    assert several.usage.completion_tokens == sum(a.usage.completion_tokens for a in one)
    chunks = list(
        client.chat.completions.create(
            model="dora", messages=MESSAGES, n=3, stream=True, stream_options={"include_usage": True}, **DRAWN
        )
    )
    assert chunks[-1].usage == several.usage
    for index, choice in enumerate(several.choices):
        own = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in own) == choice.message.content
        assert [c.finish_reason for c in own if c.finish_reason] == [choice.finish_reason]


def test_several_prompts_are_answered_in_order(client):
    prompts = ["abc", "once upon", "x"]
    alone = [client.completions.create(model="dora", prompt=p, n=2, **DRAWN) for p in prompts]
    together = client.completions.create(model="dora", prompt=prompts, n=2, **DRAWN)
    assert [c.text for c in together.choices] == [c.text for a in alone for c in a.choices]
    assert [c.index for c in together.choices] == list(range(6))
    assert together.usage.prompt_tokens == sum(len(p) for p in prompts)


def test_one_bad_prompt_of_several_leaves_nothing_behind(client, engine):
    with pytest.raises(openai.BadRequestError, match="300 prompt tokens"):
        client.completions.create(model="base", prompt=["fine", "x" * 300], max_tokens=200)
    wait_until_idle(engine)
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_pages
    engine.check()


@pytest.mark.parametrize("name", ["base", "dora"])
def test_chat_logprobs_are_those_of_the_merged_model(name, client, engine, base, loras):
    asked = {"model": name, "messages": MESSAGES, "logprobs": True, "top_logprobs": 4, **DRAWN}
    answer = client.chat.completions.create(**asked)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    prompt = engine.tokenizer.apply_chat_template(MESSAGES, tokenize=True, add_generation_prompt=True)["input_ids"]
    tokens = [entry.bytes[0] for entry in content]  # of this tokenizer, bytes are ids
    rows = logprob_rows(base, loras.get(name), prompt + tokens)[len(prompt) - 1 :]
    for entry, row in zip(content, rows, strict=True):
        assert entry.logprob == pytest.approx(row[entry.bytes[0]].item(), abs=2e-4)
        np.testing.assert_allclose([t.logprob for t in entry.top_logprobs], row.topk(4).values, atol=2e-4)
        assert entry.token == bytes(entry.bytes).decode(errors="replace")
    streamed = [
        entry
        for chunk in client.chat.completions.create(**asked, stream=True)
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    np.testing.assert_allclose([entry.logprob for entry in streamed], [entry.logprob for entry in content], atol=2e-4)


def test_echo_with_logprobs_scores_a_text(client, base, loras):
    """The form in which evaluation harnesses ask for the likelihood of a text."""
    text = "Once upon a time, naïve"
    answer = client.completions.create(model="plain", prompt=text, max_tokens=0, echo=True, logprobs=2, temperature=0)
    (choice,) = answer.choices
    found = choice.logprobs
    ids = list(text.encode())
    rows = logprob_rows(base, loras["plain"], ids)
    assert (choice.text, choice.finish_reason, answer.usage.completion_tokens) == (text, "length", 0)
    assert found.token_logprobs[0] is None
    np.testing.assert_allclose(found.token_logprobs[1:], rows[range(len(rows)), ids[1:]], atol=2e-4)
    assert found.top_logprobs[0] is None
    for named, row, token in zip(found.top_logprobs[1:], rows, ids[1:], strict=True):
        values = sorted({*row.topk(2).values.tolist(), row[token].item()}, reverse=True)
        np.testing.assert_allclose(sorted(named.values(), reverse=True), values, atol=2e-4)
    assert found.tokens[:3] == ["O", "n", "c"]
    assert found.tokens[-4:-2] == ["bytes:\\xc3", "bytes:\\xaf"]
    assert found.text_offset == [*range(20), 20, 20, 21, 22]
    one_more = client.completions.create(model="plain", prompt=ids, max_tokens=1, echo=True, logprobs=2, temperature=0)
    assert one_more.choices[0].logprobs.token_logprobs[:-1] == found.token_logprobs
    assert one_more.choices[0].text.startswith(text)
    assert one_more.choices[0].logprobs.text_offset == [*found.text_offset, len(text)]


def test_echo_of_several_answers_in_a_stream(client):
    asked = {"model": "dora", "prompt": ["ab", "xyz"], "echo": True, "n": 2, "logprobs": 1, **DRAWN}
    whole = client.completions.create(**asked)
    parts = [part.choices[0] for part in client.completions.create(**asked, stream=True)]
    for choice in whole.choices:
        own = [part for part in parts if part.index == choice.index]
        assert "".join(part.text for part in own) == choice.text
        assert choice.text.startswith(("ab", "xyz")[choice.index // 2])
        for name in ("tokens", "text_offset"):
            assert [x for part in own for x in getattr(part.logprobs, name)] == getattr(choice.logprobs, name)


def test_echo_without_logprobs(client):
    answer = client.completions.create(model="base", prompt="abc", max_tokens=0, echo=True)
    assert (answer.choices[0].text, answer.choices[0].logprobs) == ("abc", None)


def test_a_token_that_cannot_come_is_written_as_json_can(client, engine, monkeypatch):
    run = engine.runner.run

    def never_a(step):
        complete, logits = run(step)
        return complete, logits.index_fill(1, torch.tensor([97]), -torch.inf)

    monkeypatch.setattr(engine.runner, "run", never_a)
    monkeypatch.setattr(engine.sampler, "sample", lambda requests, logits: [97] * len(requests))
    answer = client.completions.create(model="base", prompt="x", max_tokens=2, logprobs=0)
    assert answer.choices[0].logprobs.token_logprobs == [-9999.0, -9999.0]


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_goes_away_gives_up_all_of_its_answers(stream, client, engine):
    asked = {"model": "plain", "prompt": "x", "max_tokens": 180, "n": 6, "extra_body": {"ignore_eos": True}}
    if stream:
        with client.completions.create(**asked, stream=True) as events:
            next(iter(events))
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.2).completions.create(**asked)
    wait_until_idle(engine)
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_pages
    engine.check()
