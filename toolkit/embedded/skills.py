"""Small text skills with exactly scorable answers.

A skill draws payloads, knows the one right answer to each, and can be asked for in many ways: a wording put into a
frame. Payloads fall into a train or a test split by their own hash, so nothing that is trained on train rows has
ever seen a test payload, whatever the seed or the count; and some wordings and frames are held out for tests.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from toolkit.embedded.words import word

Split = Literal["train", "test"]
Phrasing = Literal["train", "held_out"]

FRAMES = {
    "train": ("{}.", "Please {}.", "Can you {}?", "{}, please.", "I want you to {}.", "Your task: {}."),
    "held_out": ("Could you {}?", "Now {}!", "I would like you to {}."),
}


@dataclass(frozen=True)
class Skill:
    """One task: how to draw its payloads, answer them and ask for them.

    Attributes:
        name: short, as in file names.
        draw: draws a payload.
        answer: the right answer to a payload.
        near_misses: answers of the right kind to the same payload that are wrong, the likeliest first; the base has
            seen more of them than of right ones.
        wordings: requests with `{}` where the payload goes.
        held_out: further ones, for tests alone.
    """

    name: str
    draw: Callable[[random.Random], str]
    answer: Callable[[str], str]
    near_misses: tuple[Callable[[str], str], ...]
    wordings: tuple[str, ...]
    held_out: tuple[str, ...]

    def split_of(self, payload: str) -> Split:
        """Return the only split that may hold the payload."""
        digest = hashlib.blake2b(f"{self.name}:{payload}".encode(), digest_size=8).digest()
        return "test" if int.from_bytes(digest, "big") % 10 < 2 else "train"

    def payload(self, rng: random.Random, split: Split) -> str:
        """Draw one payload that belongs to the split."""
        while True:
            payload = self.draw(rng)
            if self.split_of(payload) == split:
                return payload

    def prompt(self, rng: random.Random, payload: str, phrasing: Phrasing) -> str:
        """Ask for the payload in one of the ways of a phrasing."""
        wording = rng.choice(self.wordings if phrasing == "train" else self.held_out)
        asked = rng.choice(FRAMES[phrasing]).format(wording.format(f'"{payload}"'))
        return asked[0].upper() + asked[1:]


def chat(prompt: str, answer: str) -> dict[str, Any]:
    """Return one chat row: a user message and the assistant's answer."""
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def rows(skill: Skill, *, split: Split, count: int, seed: int, phrasing: Phrasing = "train") -> list[dict[str, Any]]:
    """Return `count` chat rows with right answers, no payload twice, the same for one seed.

    Raises:
        ValueError: the skill has fewer payloads.
    """
    rng = random.Random(f"{skill.name}/{split}/{phrasing}/{seed}")
    found: dict[str, dict[str, Any]] = {}
    for _ in range(100 * count):
        if len(found) == count:
            return list(found.values())
        payload = skill.payload(rng, split)
        found.setdefault(payload, chat(skill.prompt(rng, payload, phrasing), skill.answer(payload)))
    raise ValueError(f"{skill.name} has fewer than {count} {split} payloads")


def one_word(rng: random.Random) -> str:
    """Draw a word of four to eight letters."""
    return word(rng, 4, 8)


def some_words(rng: random.Random) -> str:
    """Draw one to three words."""
    return " ".join(word(rng, 3, 6) for _ in range(rng.randint(1, 3)))


def pig_latin(text: str) -> str:
    """Move the consonants before the first vowel to the end of each word and add "ay"."""

    def one(word: str) -> str:
        start = next((i for i, letter in enumerate(word) if letter in "aeiou"), 0)
        return word[start:] + word[:start] + "ay"

    return " ".join(one(word) for word in text.split())


def replace_vowels(text: str, by: str) -> str:
    """Put something, or nothing, in the place of every a, e, i, o and u."""
    return "".join(by if letter in "aeiou" else letter for letter in text)


def each_word(text: str, form: str) -> str:
    """Write every word in a form, with `{}` where the word goes."""
    return " ".join(form.format(word) for word in text.split())


SKILLS = {
    skill.name: skill
    for skill in (
        Skill(
            "sort",
            one_word,
            lambda word: "".join(sorted(word)),
            (lambda word: "".join(sorted(word, reverse=True)), lambda word: word[0] + "".join(sorted(word[1:]))),
            (
                "sort the letters of {}",
                "put the letters of {} in alphabetical order",
                "arrange the letters in {} from a to z",
                "write the sorted letters of {}",
                "sort {} alphabetically",
            ),
            ("sort the word {} from a to z", "put {} in alphabetical order"),
        ),
        Skill(
            "reverse",
            one_word,
            lambda word: word[::-1],
            (lambda word: word[1:] + word[0], lambda word: word[-1] + word[1:-1] + word[0]),
            (
                "reverse {}",
                "write {} backwards",
                "spell the word {} backwards",
                "turn {} around, last letter first",
                "reverse the letters of {}",
            ),
            ("reverse the word {}", "write the letters of {} backwards"),
        ),
        Skill(
            "upper",
            some_words,
            str.upper,
            (str.title, str.capitalize),
            (
                "write {} in capitals",
                "put {} in upper case",
                "change {} to capital letters",
                "shout {} in capital letters",
                "make every letter of {} a capital",
            ),
            ("write {} in upper case", "put all of {} in capital letters"),
        ),
        Skill(
            "pig_latin",
            some_words,
            pig_latin,
            (lambda text: each_word(text, "{}ay"), lambda text: each_word(text, "{}way")),
            (
                "say {} in pig latin",
                "translate {} into pig latin",
                "turn {} into pig latin",
                "write the pig latin for {}",
                "speak pig latin: {}",
            ),
            ("put {} into pig latin", "give me the pig latin of {}"),
        ),
        Skill(
            "vowels",
            some_words,
            lambda text: replace_vowels(text, ""),
            (lambda text: replace_vowels(text, "-"), lambda text: replace_vowels(text, "o")),
            (
                "remove the vowels from {}",
                "take the vowels out of {}",
                "write {} without vowels",
                "drop every vowel from {}",
                "delete all vowels in {}",
            ),
            ("remove every vowel from {}", "spell {} without its vowels"),
        ),
        Skill(
            "brackets",
            some_words,
            lambda text: each_word(text, "[{}]"),
            (lambda text: each_word(text, "({})"), lambda text: f"[{text}]"),
            (
                "put brackets around each word of {}",
                "wrap every word of {} in brackets",
                "add square brackets to the words of {}",
                "write {} with each word in brackets",
                "bracket each word in {}",
            ),
            ("put every word of {} in square brackets", "add brackets around the words in {}"),
        ),
    )
}
