"""Streamed text is the text of the whole answer; stop texts never leak."""

from __future__ import annotations

import random

import pytest

from toolkit.embedded.tokenizer import build_tokenizer
from toolkit.serving.text import TextStream


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(256)


@pytest.mark.parametrize("text", ["plain words", "naïve café, 東京 🎉 done", "🎉", "", "a\n\nb  c"])
def test_pieces_put_together_are_the_text(text, tokenizer):
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(tokenizer)
    pieces = [stream.push(ids[: i + 1]) for i in range(len(ids))]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + stream.finish(ids) == text == stream.text


def test_bytes_that_are_no_text_come_out_at_the_end(tokenizer):
    ids = [*tokenizer.encode("ab", add_special_tokens=False), 0xE2, 0x82]
    stream = TextStream(tokenizer)
    assert "".join(stream.push(ids[: i + 1]) for i in range(4)) == "ab"
    assert stream.finish(ids) == tokenizer.decode([0xE2, 0x82])


@pytest.mark.parametrize("seed", range(30))
def test_stop_texts_against_a_search_in_the_whole(seed, tokenizer):
    rng = random.Random(seed)
    text = "".join(rng.choice("ab\n") for _ in range(40))
    stops = ["".join(rng.choice("ab\n") for _ in range(rng.randint(2, 6))) for _ in range(2)]
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(tokenizer, stops)
    out = ""
    for i in range(len(ids)):
        out += stream.push(ids[: i + 1])
        if stream.stopped:
            break
    else:
        out += stream.finish(ids)
    # The first stop to be complete ends the answer, where it begins.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    expected = text[: min(ends)[1]] if ends else text
    assert out == stream.text == expected
    assert stream.stopped == bool(ends)
