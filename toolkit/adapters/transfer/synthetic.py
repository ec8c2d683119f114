"""Make prompts up from a few seeds, let a discriminator choose among them, and have a teacher answer them.

A model continues a list of seeds by another entry, or the first words of one seed. Batch n draws its seeds and its
tokens from the spec's seed and n alone, so that a run that was stopped goes on to the same rows.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from toolkit.adapters.convert import load_adapted
from toolkit.adapters.transfer.spec import SyntheticSpec
from toolkit.checkpoints.writer import write_text
from toolkit.data.collate import Collator
from toolkit.data.pack import alone
from toolkit.data.render import IGNORED, Renderer
from toolkit.data.rows import Row
from toolkit.data.tokenizer import Tokenizer
from toolkit.errors import DataError
from toolkit.models.load import LoadedModel, load_model, load_tokenizer
from toolkit.progress import track

MARK = "### Request\n"
"""What stands before each seed in the list that is continued."""

_CUT = "\uffff"
"""Stands in a rendered message where its text goes on; no text holds it."""

QUESTION = "{}\n### Is this a real request of the task?"
ANSWERS = (" yes", " no")

Filter = Callable[[Sequence[str]], list[float]]
"""Returns the log odds that texts are real."""


def candidates(loaded: LoadedModel, seeds: Sequence[str], spec: SyntheticSpec, batch: int) -> list[str]:
    """Return what a model makes up in one batch; entries may be empty.

    Args:
        loaded: the generator.
        seeds: texts to draw from.
        spec: how.
        batch: its number.
    """
    rng = random.Random(f"{spec.seed}/{batch}")
    rows, opened = zip(*(_begun(loaded.tokenizer, seeds, spec, rng) for _ in range(spec.batch_size)), strict=True)
    with torch.random.fork_rng():
        torch.manual_seed(rng.getrandbits(32))
        texts = continuations(loaded, rows, spec.max_prompt_tokens, temperature=spec.temperature)
    return [(start + text).split(MARK.strip())[0].strip() for start, text in zip(opened, texts, strict=True)]


def _begun(
    tokenizer: Tokenizer, seeds: Sequence[str], spec: SyntheticSpec, rng: random.Random
) -> tuple[list[int], str]:
    """Return the tokens that one candidate continues, and what of the candidate itself is in them."""
    if spec.start == "list":
        chosen = rng.sample(list(seeds), min(spec.shots, len(seeds)))
        return tokenizer.encode("".join(f"{MARK}{text}\n\n" for text in chosen) + MARK), ""
    seed = rng.choice(list(seeds))
    opening = seed[: rng.choice([0, *(i for i, letter in enumerate(seed) if letter == " ")])]
    return _user_turn(tokenizer, opening), opening


def _user_turn(tokenizer: Tokenizer, opening: str) -> list[int]:
    """Return the tokens of a user's message up to where it goes on; of plain text where there is no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer.encode(opening or " ")
    message = [{"role": "user", "content": opening + _CUT}]
    text = str(tokenizer.apply_chat_template(message, tokenize=False))
    return tokenizer.encode(text.partition(_CUT)[0], add_special_tokens=False)


def gather(
    generator: LoadedModel,
    seeds: Sequence[str],
    spec: SyntheticSpec,
    judge: Filter | None,
    threshold: float,
    file: Path,
    *,
    quiet: bool = False,
) -> tuple[list[str], int]:
    """Make candidates up until enough are taken or all attempts are spent; go on from what the file holds.

    Args:
        generator: makes them up.
        seeds: what it starts from.
        spec: how many, and how.
        judge: says how real they look; `None` takes all.
        threshold: least log odds.
        file: where they are kept after every batch.
        quiet: show no progress.

    Returns:
        The prompts, none empty and none twice, and the number of candidates.
    """
    held: dict[str, Any] = (
        json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"batch": 0, "prompts": []}
    )
    prompts: list[str] = held["prompts"]
    batch, most = held["batch"], spec.count * spec.attempts
    with track("making rows up", spec.count, unit="rows", quiet=quiet) as progress:
        progress.advance(len(prompts))
        while len(prompts) < spec.count and batch * spec.batch_size < most:
            fresh = list(dict.fromkeys(t for t in candidates(generator, seeds, spec, batch) if t and t not in prompts))
            odds = judge(fresh) if judge and fresh else [threshold] * len(fresh)
            taken = [text for text, value in zip(fresh, odds, strict=True) if value >= threshold]
            taken = taken[: spec.count - len(prompts)]
            prompts += taken
            batch += 1
            write_text(file, json.dumps({"batch": batch, "prompts": prompts}, ensure_ascii=False))
            progress.advance(len(taken))
    return prompts, batch * spec.batch_size


def continuations(
    loaded: LoadedModel, rows: Sequence[Sequence[int]], length: int, *, temperature: float | None = None
) -> list[str]:
    """Return how a model goes on after rows of tokens, greedily without a temperature.

    Raises:
        DataError: a row that is too long for the model.
    """
    tokenizer, model = loaded.tokenizer, loaded.model
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, rows))
    if limit and longest + length > limit:
        raise DataError(
            f"{longest} tokens and {length} new ones, but the model takes {limit}; lower shots or max tokens"
        )
    pad = tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
    choice: dict[str, Any] = {"do_sample": False}
    if temperature is not None:
        choice = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.inference_mode():
        made: Any = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=length,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
            **choice,
        )
    return [tokenizer.decode(row[longest:].tolist(), skip_special_tokens=True) for row in made]


def answers(loaded: LoadedModel, prompts: Sequence[str], spec: SyntheticSpec, *, chat: bool) -> list[str]:
    """Return the teacher's answers.

    Args:
        loaded: the teacher.
        prompts: what it is asked.
        spec: how.
        chat: ask through the chat template.
    """
    return continuations(
        loaded, [asked(loaded.tokenizer, prompt, chat=chat) for prompt in prompts], spec.max_answer_tokens
    )


def asked(tokenizer: Tokenizer, prompt: str, *, chat: bool) -> list[int]:
    """Return the tokens of a prompt, up to where the answer begins."""
    if not chat:
        return tokenizer.encode(prompt)
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, tokenize=True, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]


def as_row(prompt: str, answer: str, *, chat: bool) -> dict[str, Any]:
    """Return a row to train on."""
    if not chat:
        return {"prompt": prompt, "completion": answer}
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def discriminator(loaded: LoadedModel) -> Filter:
    """Return what a model with a discriminator on it says of texts."""
    render = Renderer(loaded.tokenizer, 1 << 30)

    def judge(texts: Sequence[str]) -> list[float]:
        likelihoods = []
        for answer in ANSWERS:
            rows = [Row({"prompt": QUESTION.format(text), "completion": answer}, "") for text in texts]
            examples = [alone(render.render(row)) for row in rows]
            batch = Collator(loaded.tokenizer.pad_token_id or 0)(examples)
            batch = {name: value.to(loaded.model.device) for name, value in batch.items()}
            labels = batch.pop("labels")
            with torch.inference_mode():
                scores = loaded.model(**batch, use_cache=False).logits[:, :-1].float()
            losses = functional.cross_entropy(
                scores.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none"
            )
            likelihoods.append(-losses.sum(1))
        return (likelihoods[0] - likelihoods[1]).tolist()

    return judge


@contextmanager
def adapted(base: Any, adapter: str, **options: Any) -> Iterator[LoadedModel]:
    """Yield a base with an adapter on it; a base that came as an object loses the adapter again."""
    if isinstance(base, tuple | LoadedModel):
        found = load_model(base)
        tokenizer = found.tokenizer
        base = (found.model, tokenizer)
    else:
        tokenizer = load_tokenizer(base, trust_remote_code=options.get("trust_remote_code", False))
    model: Any = load_adapted(adapter, base, **options)
    try:
        yield LoadedModel(adapter, model, tokenizer)
    finally:
        if isinstance(base, tuple) and hasattr(model.base_model, "unload"):
            model.base_model.unload()
