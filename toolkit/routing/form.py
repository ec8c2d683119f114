"""The form of a text in a few numbers: how long it is, what it is made of, whether it lists choices or asks.

Length alone tells hard questions from easy ones better than many learned routers do, and it needs no model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from toolkit.routing.ops import Vectors

_WORD, _NUMBER = re.compile(r"\w+"), re.compile(r"\d+(?:[.,]\d+)*")
_CHOICE = re.compile(r"^\(?[A-Ha-h1-9][.)] ?(.*)$", re.MULTILINE)
_FORMULA, _QUOTE = re.compile(r"[=+*/^<>$\\{}_|]"), re.compile("[\"'`\u201c\u201d\u2018\u2019]")
_NEGATION = re.compile(r"\b(?:not|no|never|none|except|least|false|incorrect)\b", re.IGNORECASE)

NAMES = (
    "characters words sentences lines commas questions numbers digits formula quotes negations choices"
    " letters_per_choice letters_per_word different_words share_upper share_marks share_other_scripts"
).split()
"""What each number is. Counts and lengths are `log(1 + n)`; shares are of the characters, or of the words."""


def vectors(texts: Sequence[str]) -> Vectors:
    """Return `[len(texts), len(NAMES)]` float32."""
    return np.array([_form(text) for text in texts], np.float32).reshape(-1, len(NAMES))


def _form(text: str) -> list[float]:
    words = _WORD.findall(text)
    choices = _CHOICE.findall(text)
    length, count = max(len(text), 1), max(len(words), 1)
    counts = [
        len(text),
        len(words),
        len(re.findall(r"[.!?](?:\s|$)", text)),
        text.count("\n"),
        text.count(","),
        text.count("?"),
        len(_NUMBER.findall(text)),
        sum(character.isdigit() for character in text),
        len(_FORMULA.findall(text)),
        len(_QUOTE.findall(text)),
        len(_NEGATION.findall(text)),
        len(choices),
        sum(map(len, choices)) / max(len(choices), 1),
        sum(map(len, words)) / count,
    ]
    shares = [
        len({word.lower() for word in words}) / count,
        sum(character.isupper() for character in text) / length,
        sum(not character.isalnum() and not character.isspace() for character in text) / length,
        sum(ord(character) > 127 for character in text) / length,
    ]
    return [*np.log1p(counts), *shares]
