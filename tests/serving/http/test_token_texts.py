"""Bytes of tokens against what the tokenizers decode."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from toolkit.embedded.tokenizer import build_tokenizer
from toolkit.serving.http.token_texts import TokenTexts


def test_bytes_of_a_byte_level_vocabulary():
    texts = TokenTexts(build_tokenizer())
    assert [texts.bytes_of(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert texts.bytes_of(257) == b"<|end|>"
    assert texts.bytes_of(9999) == b""
    assert (texts.text(0xE2), texts.name(0xE2), texts.name(65)) == ("\ufffd", "bytes:\\xe2", "A")
    assert len({texts.name(i) for i in range(262)}) == 262, "names tell tokens apart"


@pytest.mark.parametrize("text", ["plain words", "naïve café, 東京 🎉 done"])
def test_bytes_put_together_are_the_text(text):
    tokenizer = build_tokenizer()
    texts = TokenTexts(tokenizer)
    assert b"".join(texts.bytes_of(i) for i in tokenizer.encode(text)).decode() == text


def test_sentencepiece():
    pieces = ["<unk>", "<s>", "▁Paris", ".", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<s>"])
    texts = TokenTexts(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))
    assert [texts.bytes_of(i) for i in (1, 2, 3, 4, 5 + 0xC3)] == [b"<s>", b" Paris", b".", b" ", b"\xc3"]
