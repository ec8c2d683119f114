"""Cascades and meta ranking with models made by hand, and with real servers."""

from __future__ import annotations

import http.server
import json
import math
import threading

import numpy as np
import pytest

from toolkit.errors import DataError, RequestError, UnsupportedError
from toolkit.routing.cascade import Cascade, Completion, confidence
from toolkit.routing.endpoint import Endpoint
from toolkit.routing.meta_ranking import AskedComparator, MetaRanking, Reference
from toolkit.serving.engine import Engine
from toolkit.serving.serve import background_server

QUALITY = [0.1, 0.25, 0.4, 0.6, 0.75, 0.9]
"""What the references' answers are worth; right from one half on."""


class Fixed:
    """A model that says the same to everything."""

    def __init__(self, name, text, cost, logprobs=()):
        self.name, self.completion = name, Completion(text, logprobs, cost)

    def __call__(self, prompt):
        return self.completion


def references():
    return [Reference(f"q{i}", str(quality), quality >= 0.5) for i, quality in enumerate(QUALITY)]


def perfect(a, b):
    """A comparator that sees the worth, which is the response itself."""
    return float(np.sign(float(a[1]) - float(b[1])))


@pytest.mark.system("meta_ranking")
@pytest.mark.parametrize("worth", [0.0, 0.1, 0.3, 0.41, 0.59, 0.6, 0.7, 1.0])
def test_perfect_comparator_decides_as_the_oracle(worth):
    judge = MetaRanking(references(), perfect)
    reliability = judge.reliability("a question", str(worth))
    wrong, right = QUALITY[:3], QUALITY[3:]
    expected = np.mean([np.sign(worth - r) for r in right]) + np.mean([np.sign(worth - r) for r in wrong])
    assert reliability == pytest.approx(expected)
    if worth <= 0.4 or worth >= 0.6:
        assert (reliability > 0) == (worth >= 0.5)


@pytest.mark.system("meta_ranking")
@pytest.mark.parametrize("bias", [0.3, 1.0, 5.0])
def test_a_liking_for_one_place_cancels(bias):
    plain = MetaRanking(references(), perfect)
    biased = MetaRanking(references(), lambda a, b: perfect(a, b) + bias)
    for worth in (0.05, 0.3, 0.5, 0.8):
        assert biased.reliability("q", str(worth)) == pytest.approx(plain.reliability("q", str(worth)), abs=1e-12)
    always_first = MetaRanking(references(), lambda a, b: 1.0)
    assert always_first.reliability("q", "0.9") == 0


@pytest.mark.system("meta_ranking")
def test_order_of_the_references_does_not_matter():
    rng = np.random.default_rng(0)
    opinions = {r.prompt: float(rng.standard_normal()) for r in references()}
    compare = lambda a, b: opinions.get(b[0], 0.0) - opinions.get(a[0], 0.0)  # noqa: E731
    found = {
        MetaRanking([references()[i] for i in rng.permutation(6)], compare).reliability("q", "x") for _ in range(30)
    }
    assert len(found) == 1


@pytest.mark.system("meta_ranking")
def test_coin_flips_accept_half():
    rng = np.random.default_rng(0)
    judge = MetaRanking(references()[:5], lambda a, b: float(rng.choice([-1, 1])))
    found = np.array([judge.reliability("q", "x") for _ in range(4000)])
    accepted = (found > 0).mean() + (found == 0).mean() / 2
    assert abs(accepted - 0.5) < 4 * 0.5 / math.sqrt(4000)


@pytest.mark.system("meta_ranking")
def test_threshold_from_always_cheap_to_always_strong():
    judge = MetaRanking(references(), perfect)
    answers = np.random.default_rng(1).random(90)
    answers = answers[(answers < 0.4) | (answers > 0.6)][:60]  # nothing tells where between the references right begins
    costs, shares = [], []
    for threshold in (-math.inf, -1.0, 0.0, 0.5, 1.5, math.inf):
        found = [
            Cascade([Fixed("cheap", str(a), 1.0), Fixed("strong", "1.0", 10.0)], judge, threshold)("q") for a in answers
        ]
        costs.append(sum(answer.cost for answer in found))
        shares.append(np.mean([answer.model == "strong" for answer in found]))
    assert (np.diff(costs) >= 0).all()
    assert shares[0] == 0
    assert shares[-1] == 1
    assert costs[0] == pytest.approx(60)
    assert costs[-1] == pytest.approx(60 * 11)
    assert shares[2] == (answers < 0.5).mean()


def test_references_of_one_kind_say_nothing():
    with pytest.raises(DataError, match="needs references of both kinds"):
        MetaRanking(references()[:3], perfect)


def test_confidence_is_the_geometric_mean():
    assert confidence("q", Completion("a", (math.log(0.5), math.log(0.125)))) == pytest.approx(0.25)
    assert confidence("q", Completion("a")) == 0


def test_cascade_by_confidence_abstains():
    sure, unsure = (math.log(0.9),), (math.log(0.2),)
    stages = [Fixed("cheap", "a", 1.0, unsure), Fixed("strong", "b", 5.0, unsure)]
    passed = Cascade(stages, confidence, 0.5)("q")
    assert (passed.text, passed.model, passed.cost) == ("b", "strong", 6.0)
    assert passed.stages[1].reliability is None, "an answer that is taken anyway is not judged"
    withheld = Cascade(stages, confidence, 0.5, abstain=0.3)("q")
    assert (withheld.text, withheld.model, withheld.cost) == (None, None, 6.0)
    taken = Cascade([Fixed("cheap", "a", 1.0, sure), stages[1]], confidence, 0.5, abstain=0.3)("q")
    assert (taken.text, taken.cost, len(taken.stages)) == ("a", 1.0, 1)
    assert json.loads(json.dumps(taken.to_dict()))["stages"][0]["model"] == "cheap"
    with pytest.raises(ValueError, match="a cascade needs a model"):
        Cascade([], confidence, 0)


@pytest.mark.parametrize(("reply", "expected"), [("A", 1), (" B.", -1), ("SAME", 0), ("Both are bad", 0), ("", 0)])
def test_reply_of_a_comparing_model(reply, expected):
    asked = []
    model = Fixed("judge", reply, 0)
    model.__class__ = type("Spy", (Fixed,), {"__call__": lambda self, prompt: asked.append(prompt) or self.completion})
    assert AskedComparator(model)(("q1", "r{1}"), ("q2", "r2")) == expected
    assert "Question A: q1\nAnswer A: r{1}\n" in asked[0]
    assert "Question B: q2\nAnswer B: r2\n" in asked[0]


def test_endpoint_is_our_own_server_and_a_cascade_runs_on_it(base, loras):
    with Engine(str(base), {"plain": str(loras["plain"])}) as engine, background_server(engine) as url:
        cheap = Endpoint(f"{url}/v1", "base", max_tokens=4, input_price=1e6, output_price=2e6)
        strong = Endpoint(f"{url}/v1/", "plain", max_tokens=4)
        expected = engine_text(url, "base")
        completion = cheap("hello")
        assert completion.text == expected["choices"][0]["message"]["content"]
        usage = expected["usage"]
        assert completion.cost == usage["prompt_tokens"] + 2 * usage["completion_tokens"]
        assert len(completion.logprobs) == usage["completion_tokens"]
        assert 0 < confidence("hello", completion) <= 1
        for threshold, model in ((0.0, "base"), (math.inf, "plain")):
            answer = Cascade([cheap, strong], confidence, threshold)("hello")
            assert answer.model == model
            assert answer.text == engine_text(url, model)["choices"][0]["message"]["content"]
        with pytest.raises(RequestError, match=r"answered 404"):
            Endpoint(f"{url}/v1", "nobody")("hello")


def engine_text(url, model):
    import httpx

    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "temperature": 0}
    return httpx.post(f"{url}/v1/chat/completions", json=body, trust_env=False).json()


@pytest.fixture
def stub():
    """A server that answers what it is told to, and keeps what it was asked."""
    told = {"body": b"{}", "seen": []}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            told["seen"].append((dict(self.headers), json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(told["body"])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", told
    server.shutdown()
    server.server_close()
    thread.join()


def test_endpoint_sends_its_key_and_reads_what_is_left_out(stub, monkeypatch):
    url, told = stub
    told["body"] = json.dumps({"choices": [{"message": {"content": None}}]}).encode()
    monkeypatch.setenv("SOME_KEY", "hidden")
    endpoint = Endpoint(url, "m", key_variable="SOME_KEY", logprobs=False, options={"temperature": 0.5})
    assert endpoint("hi") == Completion("", (), 0.0)
    headers, body = told["seen"][0]
    assert headers["Authorization"] == "Bearer hidden"
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 512,
        "temperature": 0.5,
    }
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(UnsupportedError, match="set SOME_KEY to the API key of"):
        endpoint("hi")


def test_cascade_of_our_server_and_a_foreign_one_abstains(base, stub):
    """Cheap is a served base, strong a server of somebody else's; which answers come is told by the thresholds."""
    url, told = stub
    sure = {"content": [{"logprob": math.log(0.5)}, {"logprob": math.log(0.5)}]}
    told["body"] = json.dumps({"choices": [{"message": {"content": "far"}, "logprobs": sure}]}).encode()
    strong = Endpoint(url, "large")
    with Engine(str(base)) as engine, background_server(engine) as own:
        cheap = Endpoint(f"{own}/v1", "base", max_tokens=4)
        near = confidence("hello", cheap("hello"))
        taken = Cascade([cheap, strong], confidence, near, abstain=near)("hello")
        assert (taken.model, len(told["seen"])) == ("base", 0), "an answer that is sure enough never leaves the house"
        passed = Cascade([cheap, strong], confidence, near + 0.01, abstain=0.5)("hello")
        assert (passed.text, passed.model) == ("far", "large")
        assert [stage.reliability for stage in passed.stages] == pytest.approx([near, 0.5])
        withheld = Cascade([cheap, strong], confidence, near + 0.01, abstain=0.51)("hello")
        assert (withheld.text, withheld.model) == (None, None)
        assert [stage.text for stage in withheld.stages][1] == "far"
        assert len(told["seen"]) == 2
        references = [Reference("1 + 1?", "2", True), Reference("1 + 1?", "3", False)]
        asking = MetaRanking(references, AskedComparator(cheap))
        judged = Cascade([strong, cheap], asking, 3.0)("hello")
        assert judged.model == "base"
        assert -2 <= judged.stages[0].reliability <= 2


@pytest.mark.parametrize("body", [b"{}", b"not json", b"[]", b'{"choices": []}', b'{"choices": [{"message": 5}]}'])
def test_answers_that_are_none(body, stub):
    url, told = stub
    told["body"] = body
    with pytest.raises(RequestError, match=r"not a chat completion|no answer"):
        Endpoint(url, "m")("hi")


def test_server_that_is_not_there():
    with pytest.raises(RequestError, match="no answer"):
        Endpoint("http://127.0.0.1:9/v1", "m", timeout=2)("hi")
