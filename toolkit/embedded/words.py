"""The vocabulary of the embedded base's texts, and made-up words for its skills."""

from __future__ import annotations

import random

GIRLS = "Anna Clara Ella Freya Grace Ida Lena Maya Nora Rosa Sofia Tilda Una Vera Wilma Zoe".split()
BOYS = "Adam Ben Carl David Emil Felix Hugo Ivan Jonas Karl Leo Max Noah Oscar Paul Theo".split()
PLACES = (
    "village harbour farm castle market forest valley island mill garden library bakery school station bridge"
    " lighthouse meadow orchard workshop tower"
).split()
THINGS = (
    "lamp kite key coin ring book map bell basket boat drum flute hat letter mirror scarf stone clock box ladder"
    " umbrella whistle button candle"
).split()
ANIMALS = "dog cat fox owl horse goose rabbit mouse goat crow bear duck hedgehog donkey squirrel sheep".split()
FOODS = "bread soup cheese honey apples cake pears rice plums nuts porridge berries".split()
COLOURS = "red blue green yellow white black brown grey silver golden purple orange".split()
QUALITIES = "old small heavy shiny broken strange lovely plain round painted wooden tiny".split()
MOODS = "happy proud tired hungry curious brave quiet worried sleepy cheerful patient calm".split()
TRADES = "baker miller fisher teacher farmer painter sailor doctor carpenter gardener".split()
WEATHERS = "rainy sunny windy cold warm foggy snowy stormy bright misty".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SEASONS = "spring summer autumn winter".split()
TIMES = "morning afternoon evening".split()
RELATIVES = "mother father sister brother uncle aunt grandmother grandfather cousin".split()

REAL = PLACES + THINGS + ANIMALS + FOODS + COLOURS + QUALITIES + MOODS + TRADES + WEATHERS + SEASONS + TIMES + RELATIVES

_ONSETS = "b c d f g h j k l m n p r s t v w br ch cl cr dr fl gr pl sh sl sp st th tr".split()
_VOWELS = "aeiou"
_CODAS = ["", "", "", "", "l", "m", "n", "r", "s", "t", "nd", "ck", "st", "rn"]
_AWKWARD = (
    "ass anu cum cli coc coo cra cun dic fag fuc hor nad naz neg nig pen pis por pus rap sex shi slu tit tra vag"
).split()
"""Letters that made-up words should not have together."""


def word(rng: random.Random, shortest: int, longest: int) -> str:
    """Draw a word of a length: mostly made up and pronounceable, sometimes a real one."""
    if rng.random() < 0.2:
        return rng.choice([real for real in REAL if shortest <= len(real) <= longest])
    while True:
        syllables = rng.choice((1, 2, 2, 3))
        made = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))
        if shortest <= len(made) <= longest and not any(part in made for part in _AWKWARD):
            return made
