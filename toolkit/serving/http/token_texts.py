"""The texts and bytes of single tokens, as log-probabilities name them."""

from __future__ import annotations

import re
from functools import lru_cache

from toolkit.data.tokenizer import Tokenizer
from toolkit.embedded.tokenizer import byte_symbols

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"
"""How SentencePiece writes a space."""


class TokenTexts:
    """Tells what single tokens stand for.

    A token of a byte-level vocabulary can be a part of a character; decoding it alone gives a replacement character,
    which says nothing and is the same for many tokens. So bytes are read from the vocabulary itself.

    Args:
        tokenizer: used by nobody else at the same time.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        of_bytes = decoder is not None and b"ByteLevel" in decoder.__getstate__()
        self._byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())} if of_bytes else {}
        self._added = {token: str(added) for token, added in tokenizer.added_tokens_decoder.items()}
        self.bytes_of = lru_cache(maxsize=65536)(self._bytes_of)

    def _bytes_of(self, token: int) -> bytes:
        """Return the bytes of a token; none where the model has an id that the tokenizer has not."""
        if token in self._added:
            return self._added[token].encode()
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if self._byte_of and all(symbol in self._byte_of for symbol in piece):
            return bytes(self._byte_of[symbol] for symbol in piece)
        if found := _BYTE.fullmatch(piece):
            return bytes([int(found[1], 16)])
        return piece.replace(_SPACE, " ").encode()

    def text(self, token: int) -> str:
        """Return the text of a token; bytes that are none become replacement characters."""
        return self.bytes_of(token).decode(errors="replace")

    def name(self, token: int) -> str:
        r"""Return a text that names the token: its own, or `bytes:\xe2\x82`, as OpenAI's completions write it."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
