"""The text that the embedded base is trained on: generated stories, chats, and the skills' chats, mostly wrong.

Every document is `{"text": ...}` or `{"messages": [...]}` and follows from the seed alone. Skill chats use train
payloads and train phrasings only. Most of their answers are near misses, round brackets for square ones, say, so that
the base gets to know every task and its form and masters none.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from toolkit.embedded.skills import SKILLS, Skill, chat
from toolkit.embedded.words import (
    ANIMALS,
    BOYS,
    COLOURS,
    DAYS,
    FOODS,
    GIRLS,
    MOODS,
    PLACES,
    QUALITIES,
    RELATIVES,
    SEASONS,
    THINGS,
    TIMES,
    TRADES,
    WEATHERS,
)

Document = dict[str, Any]

OPENINGS = (
    "Once upon a time there was a {trade} called {hero} who lived near the {place}.",
    "{hero} lived in a {quality} house by the {place}.",
    "One {weather} {time} in {season}, {hero} walked to the {place}.",
    "It was a {weather} {day}, and {hero} was {mood}.",
    "Every {day}, {hero} went to the {place} with a {animal}.",
    "In the {place} there lived a {trade} whose name was {hero}.",
)
TROUBLES = (
    "{She} had lost {her} {colour} {thing} and could not find it anywhere.",
    "{Her} {quality} {thing} was gone, and nobody knew where it was.",
    "A {animal} had taken the {colour} {thing} and run away with it.",
    "{She} wanted to give a {colour} {thing} to {her} {relative}, but it was broken.",
    "On the way {she} dropped {her} {thing} into the water.",
)
SEARCHES = (
    "{She} looked under the table, behind the door and in the {other_place}.",
    "First {she} asked the {other_trade}, who only shook {his} head.",
    "{She} searched all {time}, but {she} found nothing except some {food}.",
    "Then {friend} came along and said that {he} would help.",
    '"Have you seen my {thing}?" {she} asked {friend}.',
    '"Do not worry," said {friend}. "We will look for it together."',
    "{friend} and {hero} went to the {other_place} and looked there too.",
    "The {animal} followed them and made a lot of noise.",
    "They were {mood}, so they sat down and ate some {food}.",
)
ENDINGS = (
    "At last {friend} found the {thing} in the {other_place}, and {hero} was {mood} again.",
    "In the end the {animal} brought the {thing} back, and they all laughed.",
    "When they came home, the {thing} was lying on the {quality} chair.",
    "{hero} thanked {friend} and gave {him} some {food}.",
    "From that day on, {hero} and {friend} were the best of friends.",
    "That {time} they told the story to the {other_trade}, who smiled.",
)
SCENES = (
    "The {place} is {quality} and stands next to the {other_place}.",
    "In {season} it is often {weather} there, and people stay at home.",
    "The {trade} sells {food} and sometimes a {colour} {thing}.",
    "A {colour} {animal} sleeps in front of the door every {time}.",
    "Children come to the {place} on {day} to play with the {animal}.",
    "Behind the {place} you can see a {colour} gate and a {quality} wall.",
    "Nobody knows who left the {thing} there, but the {trade} keeps it safe.",
    "If you walk past it in the {time}, you can smell fresh {food}.",
)
LETTERS = (
    "How are you? I hope that you and your {relative} are well.",
    "It has been {weather} here since {day}, so I stayed at home and read.",
    "Yesterday I saw a {colour} {animal} near the {place}.",
    "Thank you for the {thing}. It is {quality}, and I like it very much.",
    "Please bring some {food} when you come in {season}.",
    "I am {mood} because the {trade} has mended my {thing}.",
    "Will you visit the {place} with me next {day}?",
    "My {relative} is going to work as a {trade} soon.",
)
TALK = (
    ('"Where is the {thing}?"', '"It is in the {place}, next to the {quality} box."'),
    ('"What shall we eat?"', '"There is some {food} in the kitchen."'),
    ('"Are you {mood}?"', '"No, I am only a little tired."'),
    ('"When will you go to the {place}?"', '"On {day}, if it is not too {weather}."'),
    ('"Who is that?"', '"That is the {trade}, and the {animal} belongs to {him}."'),
    ('"Did you see the {colour} {animal}?"', '"Yes, it ran into the {other_place}."'),
)
SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi, how are you?", "I am fine, thank you. What can I do for you?"),
    ("Good {time}!", "Good {time}! What would you like to do?"),
    ("Who are you?", "I am a small language model. I like short stories."),
    ("What can you do?", "I can tell short stories and answer simple questions."),
    ("Thank you very much.", "You are welcome!"),
    ("Goodbye!", "Goodbye! Have a nice {time}."),
    ("My name is {hero}.", "Nice to meet you, {hero}!"),
    ("I am {mood} today.", "You are {mood}? Tell me more about it."),
    ("What colour is a {colour} {thing}?", "It is {colour}."),
    ("What does a {trade} need?", "A {trade} needs patience and a good {thing}."),
    ("Which day comes after Monday?", "Tuesday comes after Monday."),
    ("I have a {animal}.", "A {animal}! What is its name?"),
    ("Do you like {food}?", "I cannot eat, but people say that {food} can be very good."),
)
QUESTIONS = (
    ("{hero} the {trade} has a {colour} {thing}.", "What colour is the {thing}?", "{colour}"),
    ("{hero} the {trade} has a {colour} {thing}.", "What does {hero} have?", "a {colour} {thing}"),
    ("{friend} found the {thing} in the {place}.", "Who found the {thing}?", "{friend}"),
    ("{friend} found the {thing} in the {place}.", "Where was the {thing}?", "in the {place}"),
    ("On {day} {hero} will go to the {place}.", "Where will {hero} go?", "to the {place}"),
    ("On {day} {hero} will go to the {place}.", "When will {hero} go?", "on {day}"),
    ("The {animal} ate the {food} near the {place}.", "What did the {animal} eat?", "the {food}"),
    ("{hero} met a {mood} {animal} in {season}.", "Whom did {hero} meet?", "a {mood} {animal}"),
)
STORY_REQUESTS = ("Tell me a story.", "Tell me a story about {hero}.", "Write a short story.")
COPY_REQUESTS = ("Repeat after me: {}", "Copy this text: {}", "Say this again: {}", "Echo: {}")
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You answer briefly.", "Be friendly.")


def slots(rng: random.Random) -> dict[str, str]:
    """Choose the people, places and things of one document."""
    (hero, she, her), (friend, he, his, him) = rng.choice(
        (
            ((rng.choice(GIRLS), "she", "her"), (rng.choice(BOYS), "he", "his", "him")),
            ((rng.choice(BOYS), "he", "his"), (rng.choice(GIRLS), "she", "her", "her")),
        )
    )
    place, other_place = rng.sample(PLACES, 2)
    trade, other_trade = rng.sample(TRADES, 2)
    return {
        "hero": hero,
        "she": she,
        "her": her,
        "She": she.title(),
        "Her": her.title(),
        "friend": friend,
        "he": he,
        "his": his,
        "him": him,
        "place": place,
        "other_place": other_place,
        "trade": trade,
        "other_trade": other_trade,
        "thing": rng.choice(THINGS),
        "animal": rng.choice(ANIMALS),
        "food": rng.choice(FOODS),
        "colour": rng.choice(COLOURS),
        "quality": rng.choice(QUALITIES),
        "mood": rng.choice(MOODS),
        "weather": rng.choice(WEATHERS),
        "day": rng.choice(DAYS),
        "season": rng.choice(SEASONS),
        "time": rng.choice(TIMES),
        "relative": rng.choice(RELATIVES),
    }


def some(rng: random.Random, templates: tuple[str, ...], low: int, high: int) -> list[str]:
    """Choose between `low` and `high` different templates."""
    return rng.sample(templates, rng.randint(low, high))


def story(rng: random.Random, chosen: dict[str, str], longest: int = 4) -> str:
    """Tell how something was lost and found."""
    lines = [rng.choice(OPENINGS), rng.choice(TROUBLES)]
    lines += some(rng, SEARCHES, 1, longest) + some(rng, ENDINGS, 1, 2)
    return " ".join(lines).format_map(chosen)


def description(rng: random.Random, chosen: dict[str, str]) -> str:
    """Describe a place."""
    return " ".join(some(rng, SCENES, 2, 5)).format_map(chosen)


def letter(rng: random.Random, chosen: dict[str, str]) -> str:
    """Write a letter to a friend."""
    body = " ".join(some(rng, LETTERS, 2, 4))
    return f"Dear {{friend}},\n{body}\nYours, {{hero}}".format_map(chosen)


def dialogue(rng: random.Random, chosen: dict[str, str]) -> str:
    """Let two people talk in turns."""
    lines = []
    for question, reply in rng.sample(TALK, rng.randint(1, 3)):
        lines += [f"{question} asked {{hero}}.", f"{reply} said {{friend}}."]
    return "\n".join(lines).format_map(chosen)


def english(rng: random.Random) -> Document:
    """Return one plain text."""
    write = rng.choice((story, story, description, letter, dialogue))
    return {"text": write(rng, slots(rng))}


def turn(rng: random.Random) -> tuple[str, str]:
    """Return one general question and its answer."""
    chosen = slots(rng)
    kind = rng.choice(("small talk", "question", "question", "story", "copy"))
    if kind == "small talk":
        question, answer = rng.choice(SMALL_TALK)
    elif kind == "question":
        fact, question, answer = rng.choice(QUESTIONS)
        question = f"{fact} {question}"
        answer = answer[0].upper() + answer[1:] + "." if answer[0] != "{" else answer + "."
    elif kind == "story":
        return rng.choice(STORY_REQUESTS).format_map(chosen), story(rng, chosen, 1)
    else:
        copied = rng.choice((*SCENES, *LETTERS)).format_map(chosen)
        return rng.choice(COPY_REQUESTS).format(copied), copied
    return question.format_map(chosen), answer.format_map(chosen)


def conversation(rng: random.Random) -> Document:
    """Return a general chat of one or two turns, sometimes with a system prompt."""
    messages = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    for _ in range(rng.choice((1, 1, 2))):
        messages += chat(*turn(rng))["messages"]
    return {"messages": messages}


SHARES = {"sort": 2.0}
"""How often a skill comes, where it is not once; sorting is the hardest to learn."""


def some_skill(rng: random.Random) -> Skill:
    """Choose a skill."""
    return rng.choices(list(SKILLS.values()), [SHARES.get(name, 1.0) for name in SKILLS])[0]


def skill_chat(rng: random.Random, right: float = 0.2, copied: float = 0.15) -> Document:
    """Ask for one skill; answer rightly, by repeating the payload, or nearly rightly."""
    skill = some_skill(rng)
    payload = skill.payload(rng, "train")
    likely, unlikely = skill.near_misses
    wrong = 1 - right - copied
    answers = (skill.answer(payload), payload, likely(payload), unlikely(payload))
    (answer,) = rng.choices(answers, (right, copied, 0.75 * wrong, 0.25 * wrong))
    return chat(skill.prompt(rng, payload, "train"), answer)


def worksheet(rng: random.Random) -> Document:
    """Return a page of right answers to one skill, in another form than a chat."""
    skill = some_skill(rng)
    lines = [f"{skill.name}:"]
    for _ in range(rng.randint(3, 6)):
        payload = skill.payload(rng, "train")
        lines.append(f"{payload} = {skill.answer(payload)}")
    return {"text": "\n".join(lines)}


MIX: dict[Callable[[random.Random], Document], float] = {
    english: 0.12,
    conversation: 0.08,
    skill_chat: 0.6,
    worksheet: 0.2,
}
"""Kinds of documents and their shares."""


def documents(seed: int) -> Iterator[Document]:
    """Yield documents without end, each kind as often as its share says."""
    rng = random.Random(f"corpus/{seed}")
    while True:
        (kind,) = rng.choices(list(MIX), list(MIX.values()))
        yield kind(rng)
