"""Vectors are the merged model's last hidden states."""

from __future__ import annotations

import base64

import numpy as np
import openai
import pytest
import torch

from tests import tiny

TEXTS = ["Once upon a time", "x", "naïve"]


def hidden(base, lora, text: str) -> np.ndarray:
    """`[T, H]` after the last norm, as transformers gives it."""
    with torch.inference_mode():
        output = tiny.load_merged(base, lora)(torch.tensor([list(text.encode())]), output_hidden_states=True)
    return output.hidden_states[-1][0].numpy()


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("name", ["base", "plain", "dora"])
def test_vectors_of_the_last_token(name, client, base, loras):
    answer = client.embeddings.create(model=name, input=TEXTS)
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    for entry, text in zip(answer.data, TEXTS, strict=True):
        expected = unit(hidden(base, loras.get(name), text)[-1])
        np.testing.assert_allclose(entry.embedding, expected, atol=1e-5)
    tokens = sum(len(text.encode()) for text in TEXTS)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens, answer.model) == (tokens, tokens, name)


def test_mean_pooling_without_normalising(client, base, loras):
    extra = {"pooling": "mean", "normalize": False}
    answer = client.embeddings.create(model="plain", input=TEXTS[0], encoding_format="float", extra_body=extra)
    expected = hidden(base, loras["plain"], TEXTS[0]).mean(axis=0)
    np.testing.assert_allclose(answer.data[0].embedding, expected, atol=1e-4 * np.abs(expected).max())


def test_forms_of_input_and_output(http):
    def ask(given, form: str):
        return http.post("/v1/embeddings", json={"model": "base", "input": given, "encoding_format": form}).json()

    ids = list(TEXTS[0].encode())
    one = ask(TEXTS[0], "float")["data"][0]["embedding"]
    for given in (ids, [ids], [TEXTS[0]]):
        assert ask(given, "float")["data"][0]["embedding"] == one
    packed = np.frombuffer(base64.b64decode(ask(ids, "base64")["data"][0]["embedding"]), "<f4")
    assert np.array_equal(packed, np.array(one, np.float32))


def test_vectors_are_made_while_answers_run(client, engine, base, loras):
    stream = client.completions.create(
        model="dora", prompt="ab", max_tokens=100, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    events = iter(stream)
    text = next(events).choices[0].text
    vector = client.embeddings.create(model="plain", input=TEXTS[0]).data[0].embedding
    assert engine.scheduler.running
    text += "".join(event.choices[0].text for event in events)
    np.testing.assert_allclose(vector, unit(hidden(base, loras["plain"], TEXTS[0])[-1]), atol=1e-5)
    expected = tiny.greedy(tiny.load_merged(base, loras["dora"]), list(b"ab"), 100)
    assert text == engine.tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"model": "nobody", "input": "x"}, 404, "no model 'nobody'"),
        ({"model": "base", "input": ""}, 400, "the prompt is empty"),
        ({"model": "base", "input": []}, 400, "input: Input should be a text"),
        ({"model": "base", "input": "x" * 257}, 400, "257 prompt tokens are more than the 256"),
        ({"model": "base", "input": [300]}, 400, "token id 300"),
        ({"model": "base", "input": "x", "dimensions": 8}, 400, "dimensions: 8 is not supported"),
        ({"model": "base", "input": "x", "pooling": "cls"}, 400, "pooling: Input should be 'last' or 'mean'"),
    ],
)
def test_bad_requests(body, status, message, http):
    response = http.post("/v1/embeddings", json=body)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


def test_errors_are_those_that_openais_client_knows(client):
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="nobody", input="x")
