"""Tools go to the model through its chat template, and calls come out of its text."""

from __future__ import annotations

import json
import random

import openai
import pytest

from tests import tiny
from toolkit.embedded.tokenizer import CHAT_TEMPLATE, build_tokenizer
from toolkit.serving.engine import Engine
from toolkit.serving.http.tools import BareCall, TaggedCalls, call_reader
from toolkit.serving.serve import background_server

TEMPLATE = (
    "{%- if tools -%}Call as <tool_call>...</tool_call>:{%- for tool in tools -%}{{ tool.function.name }};"
    "{%- endfor -%}{%- endif -%}{%- for m in messages -%}[{{ m.role }}]{{ m.content }}"
    "{%- for call in m.tool_calls or [] -%}{{ call.function.name }}({{ call.function.arguments.city }}){%- endfor -%}"
    "{%- if m.tool_call_id -%}#{{ m.tool_call_id }}{%- endif -%}{%- endfor -%}[assistant]"
)
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
ONE = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'

TEXTS = {
    "plain": ("just text", "just text", []),
    "one": (ONE, "", [("weather", {"city": "Zürich"})]),
    "after text": (f"Let me see.\n{ONE}", "Let me see.", [("weather", {"city": "Zürich"})]),
    "two": (f"{ONE}\n{ONE}\n", "", [("weather", {"city": "Zürich"})] * 2),
    "text after": (f"{ONE}\nDone.", "\nDone.", [("weather", {"city": "Zürich"})]),
    "no arguments": ('<tool_call>{"name": "now"}</tool_call>', "", [("now", {})]),
    "broken": ("a <tool_call>{]</tool_call> b", "a <tool_call>{]</tool_call> b", []),
    "no object": ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
    "cut": ('so <tool_call>{"name": "wea', 'so <tool_call>{"name": "wea', []),
    "begun": ("1 <tool 2 <", "1 <tool 2 <", []),
    "white space": ("a \n\n b \n", "a \n\n b \n", []),
}


def read(reader, pieces: list[str]) -> tuple[str, list[tuple[str, dict]]]:
    text, calls = "", []
    for more, found in [*(reader.push(piece) for piece in pieces), reader.finish()]:
        text, calls = text + more, calls + found
    return text, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("case", TEXTS)
def test_tagged_calls_in_any_pieces(case):
    text, content, calls = TEXTS[case]
    rng = random.Random(0)
    for _ in range(20):
        cuts = sorted(rng.sample(range(len(text) + 1), rng.randint(0, min(8, len(text)))))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert read(TaggedCalls(), pieces) == (content, calls)
    assert read(TaggedCalls(), list(text)) == (content, calls)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('{"name": "weather", "parameters": {"city": "Rom"}}', "", [("weather", {"city": "Rom"})]),
        (' {"name": "weather", "parameters": {"city": "Rom"}} ', "", [("weather", {"city": "Rom"})]),
        ('{"name": 5}', '{"name": 5}', []),
        ('Sure: {"name": "f", "parameters": {}}', 'Sure: {"name": "f", "parameters": {}}', []),
        ("  plain", "  plain", []),
    ],
)
def test_bare_calls(text, content, calls):
    assert read(BareCall(), list(text)) == (content, calls)


def test_the_template_tells_the_form():
    assert isinstance(call_reader(TEMPLATE), TaggedCalls)
    llama = """{{- 'Respond in the format {"name": function name, "parameters": dictionary of arguments}.' }}"""
    assert isinstance(call_reader(llama), BareCall)
    assert call_reader(CHAT_TEMPLATE) is None


@pytest.fixture(scope="module")
def engine():
    tokenizer = build_tokenizer(tiny.CONTEXT)
    tokenizer.chat_template = TEMPLATE
    with Engine((tiny.llama(), tokenizer)) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine):
    with background_server(engine) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as found:
        yield found


@pytest.fixture
def says(engine, monkeypatch):
    """Make the model say a text, and then end."""
    prompts = []

    def script(text: str):
        ids = [*text.encode(), 257]

        def sample(requests, logits):
            prompts.extend(engine.tokenizer.decode(r.prompt) for r in requests if not r.output)
            return [ids[len(request.output)] for request in requests]

        monkeypatch.setattr(engine.sampler, "sample", sample)
        return prompts

    return script


@pytest.mark.parametrize("case", ["plain", "one", "after text", "two"])
def test_calls_come_out_whole_and_streamed(case, client, says):
    text, content, calls = TEXTS[case]
    prompts = says(text)
    asked = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "tools": [WEATHER]}
    (choice,) = client.chat.completions.create(**asked).choices
    assert prompts[0] == "Call as <tool_call>...</tool_call>:weather;[user]hi[assistant]"
    assert (choice.message.content or "") == content
    found = choice.message.tool_calls or []
    assert [(c.function.name, json.loads(c.function.arguments)) for c in found] == calls
    assert len({c.id for c in found}) == len(found)
    assert choice.finish_reason == ("tool_calls" if calls else "stop")
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(c.delta.content or "" for c in chunks) == content
    streamed = [call for c in chunks for call in c.delta.tool_calls or []]
    assert [call.index for call in streamed] == list(range(len(calls)))
    assert [(c.function.name, json.loads(c.function.arguments)) for c in streamed] == calls
    assert chunks[-1].finish_reason == choice.finish_reason


def test_no_choice_means_no_tools_and_no_calls(client, says):
    prompts = says(ONE)
    answer = client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "hi"}], tools=[WEATHER], tool_choice="none"
    )
    assert prompts == ["[user]hi[assistant]"]
    assert answer.choices[0].message.content == ONE
    assert answer.choices[0].message.tool_calls is None


def test_calls_and_results_go_back_through_the_template(client, says):
    prompts = says("Sun.")
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rom"}'}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "22"},
    ]
    client.chat.completions.create(model="base", messages=messages)
    assert prompts == ["[user]hi[assistant]weather(Rom)[tool]22#c1[assistant]"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user"}], "a message has a content"),
        ([{"role": "tool", "content": "x"}], "has a tool_call_id"),
        ([{"role": "user", "content": "x", "tool_call_id": "c"}], "has a tool_call_id"),
        (
            [{"role": "user", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": ""}}]}],
            "only an assistant calls",
        ),
    ],
)
def test_messages_that_do_not_fit_together(messages, message, client):
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(model="base", messages=messages)


def test_a_template_that_does_not_show_tools_is_an_error(base):
    with (
        Engine(str(base)) as engine,
        background_server(engine) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="any") as client,
        pytest.raises(openai.BadRequestError, match="chat template does not show tools"),
    ):
        client.chat.completions.create(model="base", messages=[{"role": "user", "content": "x"}], tools=[WEATHER])
