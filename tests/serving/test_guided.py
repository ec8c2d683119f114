"""Answers of a given form: against enumerated languages, jsonschema, `re`, and masks made by hand."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import jsonschema
import openai
import pytest
import torch

from tests import tiny
from toolkit.embedded.tokenizer import END, build_tokenizer
from toolkit.errors import RequestError
from toolkit.serving.engine import Engine
from toolkit.serving.guide import Guide
from toolkit.serving.guided import Guides
from toolkit.serving.request import Request, Sampling
from toolkit.serving.sampling import Sampler
from toolkit.serving.serve import background_server
from toolkit.serving.spec import Limits

V = 262
MESSAGES = [{"role": "user", "content": "Say something."}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog", None, 3]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": -9, "maximum": 9}},
    "required": ["x"],
    "additionalProperties": False,
}
SCHEMAS = [
    PERSON,
    {"type": "array", "items": {"$ref": "#/$defs/point"}, "minItems": 2, "maxItems": 2, "$defs": {"point": POINT}},
    {"anyOf": [{"type": "string", "pattern": "^[a-c]{2,4}$"}, {"type": "null"}, {"const": {"a": [1, 2]}}]},
    {"type": "string", "format": "date"},
]
REGEXES = [r"[A-Z][a-z]{1,5}( [a-z]{2,4}){0,2}\.", r"\d{3}-\d{4}", r"(ab|c){2,5}", r"[^\x00-\x7f]{1,3}"]
GRAMMARS = [
    ('root ::= "(" root ")" | [0-9]', r"(?P<o>\(*)\d(?P<c>\)*)"),
    ('start: word ("," word)~0..2\nword: /[a-z]{1,3}/', r"[a-z]{1,3}(,[a-z]{1,3}){0,2}"),
]


@pytest.fixture(scope="module")
def guides():
    return Guides(build_tokenizer(), V, {END})


@pytest.fixture(scope="module")
def engine(base, loras):
    limits = Limits(max_requests=8, page_size=4, max_batch_tokens=64, cache_tokens=2000)
    with Engine(str(base), {name: loras[name] for name in ("plain", "wide")}, limits=limits) as found:
        yield found


def allowed(matcher, output) -> set[int]:
    masked = matcher.masked(output, torch.arange(V, dtype=torch.float32))
    kept = masked.isfinite()
    assert torch.equal(masked[kept], torch.arange(V, dtype=torch.float32)[kept])
    return set(kept.nonzero().flatten().tolist())


LANGUAGES = [
    (Guide("regex", "(yes|no|not|maybe)"), ["yes", "no", "not", "maybe"]),
    (Guide("regex", "a?b{0,2}"), ["", "a", "b", "bb", "ab", "abb"]),
    (Guide.of_choice(["a", 'a"b\\', "über", "x\ny", "root ::= a"]), ["a", 'a"b\\', "über", "x\ny", "root ::= a"]),
    (Guide("grammar", 'root ::= "x" ("y" | "z") "é"?'), ["xy", "xz", "xyé", "xzé"]),
    (Guide.of_schema({"enum": [1, 12, "a"]}), ["1", "12", '"a"']),
]


@pytest.mark.parametrize(("guide", "language"), LANGUAGES, ids=[str(at) for at in range(len(LANGUAGES))])
def test_masks_are_those_of_the_enumerated_language(guide, language, guides):
    texts = [text.encode() for text in language]
    for text in texts:
        matcher = guides.start(guide)
        for at in range(len(text) + 1):
            begun = text[:at]
            expected = {other[at] for other in texts if other.startswith(begun) and len(other) > at}
            assert allowed(matcher, list(begun)) == expected | ({END} if begun in texts else set())


def answers(engine, guide, models="base", count=6, tokens=120):
    samplings = [Sampling(max_tokens=tokens, temperature=1.0, seed=seed, guide=guide) for seed in range(count)]
    names = [models] * count if isinstance(models, str) else models
    tickets = [engine.submit(f"{at}", name, s) for at, (name, s) in enumerate(zip(names, samplings, strict=True))]
    while engine.has_work:
        engine.step()
        engine.check()
    return [ticket.answer() for ticket in tickets]


@pytest.mark.parametrize("schema", SCHEMAS, ids=["object", "array", "anyOf", "format"])
def test_random_answers_fit_their_schema(schema, engine):
    found = answers(engine, Guide.of_schema(schema), ["base", "plain", "wide"] * 2)
    whole = [answer.text for answer in found if answer.finish_reason == "stop"]
    assert len(whole) >= 3
    for text in whole:
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
    assert len(set(whole)) > 1, "they are drawn"


@pytest.mark.parametrize("regex", REGEXES)
def test_random_answers_match_their_expression(regex, engine):
    found = answers(engine, Guide("regex", regex))
    assert {answer.finish_reason for answer in found} == {"stop"}
    for answer in found:
        assert re.fullmatch(regex, answer.text), answer.text


@pytest.mark.parametrize(("grammar", "regex"), GRAMMARS, ids=["gbnf", "lark"])
def test_random_answers_follow_their_grammar(grammar, regex, engine):
    found = answers(engine, Guide("grammar", grammar), tokens=60)
    whole = [answer.text for answer in found if answer.finish_reason == "stop"]
    assert whole
    for text in whole:
        match = re.fullmatch(regex, text)
        assert match
        if "o" in match.groupdict():
            assert len(match["o"]) == len(match["c"]), "a regular expression could not count them"


@pytest.mark.parametrize("model", ["base", "plain"])
def test_greedy_answers_are_the_likeliest_of_the_form(model, engine, base, loras):
    language = [b"left", b"lower", b"right", b"rise up", b"down"]
    reference = tiny.load_merged(base, None if model == "base" else loras[model])
    prompt = engine.tokenizer.encode("Where to?")
    begun = b""
    while begun not in language:
        with torch.inference_mode():
            logits = reference(torch.tensor([[*prompt, *begun]])).logits[0, -1]
        following = sorted({text[len(begun)] for text in language if text.startswith(begun)})
        begun += bytes([max(following, key=lambda byte: float(logits[byte]))])
    guide = Guide.of_choice([text.decode() for text in language])
    [answer] = engine.generate(["Where to?"], model, Sampling(guide=guide))
    assert (answer.text, answer.finish_reason) == (begun.decode(), "stop")


def test_each_of_a_batch_has_its_own_form(engine):
    guides = [None, Guide("regex", REGEXES[0]), Guide.of_schema(PERSON), None, Guide("regex", REGEXES[1]), None]
    models = ["base", "plain", "wide", "plain", "plain:0.5+wide:0.5", "wide"]
    asked = [
        (f"prompt {at}", model, Sampling(max_tokens=24, temperature=1.0, seed=at, guide=guide))
        for at, (guide, model) in enumerate(zip(guides, models, strict=True))
    ]
    tickets = [engine.submit(*one) for one in asked]
    while engine.has_work:
        engine.step()
    together = [ticket.answer().text for ticket in tickets]
    assert together == [engine.generate([prompt], model, sampling)[0].text for prompt, model, sampling in asked]
    assert engine.sampler._matchers == {}, "nothing is kept of answers that are finished"


def test_bias_cannot_break_the_form(engine):
    sampling = Sampling(guide=Guide("regex", "[ab]{3}"), logit_bias={ord("z"): 100.0, ord("b"): 100.0})
    assert engine.generate(["x"], "base", sampling)[0].text == "bbb"


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (Guide("regex", "(open"), "the regex cannot be followed: .*unclosed group"),
        (Guide("regex", "a(?=b)"), "look-around"),
        (Guide("json_schema", "{"), "the json schema cannot be followed"),
        (Guide.of_schema({"type": "objct"}), "objct"),
        (Guide.of_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (Guide.of_schema({"uniqueItems": True, "type": "array", "x-guidance": {"lenient": True}}), "uniqueItems"),
        (Guide("grammar", "@@@"), "the grammar cannot be followed"),
        (Guide("grammar", "start: nope"), "unknown name"),
    ],
)
def test_what_cannot_be_followed_is_one_line(guide, message, engine):
    with pytest.raises(RequestError, match=message) as caught:
        engine.submit("x", "base", Sampling(guide=guide))
    assert "\n" not in str(caught.value)
    assert not engine.has_work


def test_refusals_without_a_form_to_blame(monkeypatch):
    guide = Guide("regex", "a")
    with pytest.raises(RequestError, match="no end token"):
        Guides(build_tokenizer(), V, set()).compile(guide)
    with pytest.raises(RequestError, match="tokenizer cannot guide answers"):
        Guides([], V, {END}).compile(guide)
    with pytest.raises(RequestError, match="nested too deeply"):
        Guide.of_schema(nested(700))
    with pytest.raises(RequestError, match="ignore_eos must be false"):
        Sampling(guide=guide, ignore_eos=True)
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with pytest.raises(RequestError, match=r"guided answers need .*pip install 'composition-toolkit\[serve\]'"):
        Guides(build_tokenizer(), V, {END}).compile(guide)


def test_a_form_that_no_token_continues():
    sampler = Sampler(Guides(build_tokenizer(), 50, {49}))
    stuck = Request("r1", [1], sampling=Sampling(guide=Guide("regex", "z")))
    assert sampler.sample([stuck], torch.zeros(1, 50)) == [None]
    assert sampler.fault(stuck) == "no token of the model continues the form that was asked for"
    lost = Request("r2", [1], sampling=Sampling(guide=Guide("regex", "1+")), output=[ord("0")])
    assert sampler.sample([lost, Request("r3", [1])], torch.zeros(2, 50)) == [None, 0]
    assert sampler.fault(lost)
    assert sampler.fault(Request("r4", [1])) is None


def test_compiled_guides_are_shared_and_bounded(monkeypatch):
    monkeypatch.setattr("toolkit.serving.guided.MOST_KEPT", 2)
    guides = Guides(build_tokenizer(), V, {END})
    first = guides.compile(Guide("regex", "a"))
    guides.start(Guide("regex", "a")).masked([ord("a")], torch.zeros(V))
    assert guides.compile(Guide("regex", "a")) is first
    assert allowed(guides.start(Guide("regex", "a")), []) == {ord("a")}, "an answer moves a copy"
    for regex in ("b", "c"):
        guides.compile(Guide("regex", regex))
    assert guides.compile(Guide("regex", "a")) is not first


@pytest.fixture(scope="module")
def client(engine):
    with background_server(engine) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as found:
        yield found


def chat(client, model="plain", **fields):
    extra = {name: fields.pop(name) for name in list(fields) if name.startswith(("guided", "structured"))}
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=150, seed=1, extra_body=extra, **fields
    )
    assert answer.choices[0].finish_reason == "stop"
    return answer.choices[0].message.content


def test_every_way_to_name_a_form(client):
    small = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}
    small["additionalProperties"] = False
    named = {"type": "json_schema", "json_schema": {"name": "small", "strict": True, "schema": small}}
    asked = [{"response_format": named}, {"guided_json": small}, {"structured_outputs": {"json": small}}]
    assert {jsonschema.validate(json.loads(chat(client, **one)), small) for one in asked} == {None}
    for one in ({"guided_regex": "[ab]{4}"}, {"structured_outputs": {"regex": "[ab]{4}"}}):
        assert re.fullmatch("[ab]{4}", chat(client, **one))
    for one in ({"guided_grammar": 'root ::= "a" "b"'}, {"structured_outputs": {"grammar": 'root ::= "a" "b"'}}):
        assert chat(client, **one) == "ab"
    for one in ({"guided_choice": ["yes", "no"]}, {"structured_outputs": {"choice": ["yes", "no"]}}):
        assert chat(client, **one) in ("yes", "no")
    text = client.completions.create(
        model="base", prompt=["a", "b"], n=2, max_tokens=9, extra_body={"guided_regex": "[0-9]{3}"}
    )
    assert all(re.fullmatch("[0-9]{3}", choice.text) for choice in text.choices)
    assert len(text.choices) == 4


def test_json_object_begins_one(client):
    answer = client.chat.completions.create(
        model="base", messages=MESSAGES, max_tokens=20, response_format={"type": "json_object"}
    )
    assert answer.choices[0].message.content.startswith("{")
    assert client.chat.completions.create(
        model="base", messages=MESSAGES, max_tokens=2, response_format={"type": "text"}
    )


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guided_regex": "(open"}, "the regex cannot be followed"),
        ({"guided_json": {"type": "objct"}}, "the json schema cannot be followed"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "the request asks for several"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_json": True}, "guided_json"),
        ({"guided_json": nested(200)}, "the json schema cannot be followed: recursion limit"),
        ({"response_format": {"type": "json_schema"}}, "of type json_schema, and no other"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag: not supported"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos must be false"),
        ({"guided_regex": "a", "tools": [{"type": "function", "function": {"name": "f"}}]}, "cannot have a form"),
    ],
)
def test_wrong_forms_are_400(fields, message, client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="base", messages=MESSAGES, extra_body=fields)
    assert message in str(caught.value)
