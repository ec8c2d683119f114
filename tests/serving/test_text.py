"""Streamed text is the text of the whole answer; stop texts never leak."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

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


@pytest.fixture(scope="module")
def sentencepiece():
    """A tokenizer that decodes as Llama 2's: `▁` is a space, the first of a text is dropped, bytes are tokens."""
    pieces = ["<unk>", "<s>", "▁The", "▁capital", "▁is", "▁Paris", ".", "▁", "\n", "▁x"]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


E_ACUTE = [10 + byte for byte in "é".encode()]


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        ([1, 2, 3, 4], [5, 6], " Paris."),
        ([1, 2, 3, 4] * 9, [5, 6, 5], " Paris. Paris"),
        ([1, 2], [7, 5], "  Paris"),
        ([1, 2], [1, 5], " Paris"),
        ([1], [5, 6], "Paris."),
        ([], [5], "Paris"),
        ([1, 2, 8], [9, *E_ACUTE, 9], " xé x"),
        ([1, 2, *E_ACUTE], [6, 5], ". Paris"),
    ],
)
def test_an_answer_keeps_the_space_it_begins_with(prompt, answer, text, sentencepiece):
    stream = TextStream(sentencepiece, prompt=prompt)
    pieces = [stream.push(answer[: i + 1]) for i in range(len(answer))]
    assert "".join(pieces) + stream.finish(answer) == text == stream.text
    whole, known = (sentencepiece.decode(ids, skip_special_tokens=True) for ids in (prompt + answer, prompt))
    assert text == whole[len(known) :]


def test_an_answer_that_completes_a_character_of_the_prompt(sentencepiece):
    stream = TextStream(sentencepiece, prompt=[2, E_ACUTE[0]])
    assert stream.push([E_ACUTE[1]]) + stream.push([E_ACUTE[1], 5]) + stream.finish([E_ACUTE[1], 5]) == "\ufffd Paris"
