"""Train on the model's own answers where they are right (2502.08130, selective self-to-supervised fine-tuning).

Before the first step the base answers every prompt greedily, and a judge compares with the gold answer. Where it finds
the base right, its own words are trained; elsewhere the gold answer, or a paraphrase of it that the row brings. So the
model is drawn less far from where it was than by the gold answers alone.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field

from toolkit.adapters import processes
from toolkit.adapters.spec import SourceSpec, TrainSpec
from toolkit.adapters.training._base import TrainingMethod
from toolkit.checkpoints.writer import write_text
from toolkit.data.rows import Row, split_answer
from toolkit.errors import Problem
from toolkit.models.load import LoadedModel
from toolkit.models.modes import evaluating

if TYPE_CHECKING:
    from toolkit.data.tokenizer import Tokenizer

FILE = "self_labels.jsonl"
"""In the folder of the result: every row's place, and what was trained on: `self`, `gold` or `paraphrase`."""

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class S3ft(TrainingMethod):
    """Self-labelled rows."""

    class Params(TrainingMethod.Params):
        """Parameters.

        Attributes:
            judge: `exact` wants the gold answer itself, white space around it apart; `contains` wants it somewhere
                in the answer; `number` compares the last number of each.
            paraphrase: field of a row with another wording of its gold answer.
            max_new_tokens: of an answer; a longer one is wrong.
            batch_size: prompts that are answered at once.
        """

        judge: Literal["exact", "contains", "number"] = "exact"
        paraphrase: str | None = None
        max_new_tokens: Annotated[int, Field(ge=1)] = 128
        batch_size: Annotated[int, Field(ge=1)] = 16

    params: Params

    def __init__(self, params: Params, spec: TrainSpec) -> None:
        super().__init__(params, spec)
        self.sources: Counter[str] = Counter()

    def faults(self) -> Iterator[Problem]:
        """Refuse rows that have no answer of their own, or are not there yet."""
        if self.spec.objective.method != "completion":
            yield Problem("objective", "s3ft answers prompts; it needs objective: completion")
        if self.spec.data.streaming:
            yield Problem("data.streaming", "s3ft answers all rows before the first step; set it to false")
        if processes.world() > 1:
            yield Problem(self.where, "s3ft answers in one process; train the rows that one such run leaves")

    def rows(self, rows: list[Row], source: SourceSpec, loaded: LoadedModel, folder: Path | None) -> list[Row]:
        """Put the base's own right answers in the place of gold ones; a resumed run finds them in its folder.

        Raises:
            DataError: a row without an answer.
        """
        answers = self._answers(rows, loaded, folder)
        labelled = [self._labelled(row, answer) for row, answer in zip(rows, answers, strict=True)]
        self.sources.update(origin for _, origin in labelled)
        if folder is not None:
            lines = [{"place": r.place, "source": o, "answer": a} for (r, o), a in zip(labelled, answers, strict=True)]
            kept = [line for line in _read(folder / FILE) if line["place"] not in {r.place for r in rows}]
            write_text(folder / FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in [*kept, *lines]))
        return [row for row, _ in labelled]

    def _answers(self, rows: Sequence[Row], loaded: LoadedModel, folder: Path | None) -> list[str]:
        known = {line["place"]: line["answer"] for line in _read(folder / FILE)} if folder else {}
        if all(row.place in known for row in rows):
            return [known[row.place] for row in rows]
        prompts = [_prompt(split_answer(row)[0], loaded.tokenizer) for row in rows]
        return answers(loaded, prompts, self.params.max_new_tokens, self.params.batch_size)

    def _labelled(self, row: Row, answer: str) -> tuple[Row, str]:
        """Return a row with the answer that is trained, and where that is from."""
        gold = split_answer(row)[1]
        if self.is_right(answer, gold):
            return _answered(row, answer), "self"
        other = row.data.get(self.params.paraphrase) if self.params.paraphrase else None
        return (_answered(row, other), "paraphrase") if isinstance(other, str) else (row, "gold")

    def is_right(self, answer: str, gold: str) -> bool:
        """Judge an answer; an empty one, on which nothing can be trained, is wrong."""
        if not answer.strip():
            return False
        if self.params.judge == "exact":
            return answer.strip() == gold.strip()
        if self.params.judge == "contains":
            return gold.strip() in answer
        found, wanted = _last_number(answer), _last_number(gold)
        return found is not None and found == wanted

    def record(self) -> dict[str, Any]:
        """Return how many rows were trained on which answer."""
        return {"self_labels": dict(self.sources)}


def answers(loaded: LoadedModel, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int) -> list[str]:
    """Continue prompts greedily with the base, an adapter on it switched off; what does not end is an empty text.

    Args:
        loaded: the model; evaluated without dropout, whatever its mode.
        prompts: token ids.
        max_new_tokens: of an answer.
        batch_size: prompts at once, those of like length together.
    """
    model: Any = loaded.model
    pad, end = int(loaded.tokenizer.pad_token_id or 0), loaded.tokenizer.eos_token_id
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = [""] * len(prompts)
    with torch.no_grad(), evaluating(model), getattr(model, "disable_adapter", nullcontext)():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            length = max(len(prompts[i]) for i in chosen)
            ids = torch.tensor([[pad] * (length - len(prompts[i])) + prompts[i] for i in chosen], device=model.device)
            real = torch.tensor([[0] * (length - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen])
            made = model.generate(
                input_ids=ids,
                attention_mask=real.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=pad,
                eos_token_id=end,
            )
            for i, row in zip(chosen, made[:, length:].tolist(), strict=True):
                if end is None or end in row:  # one that is cut off is no answer
                    found[i] = loaded.tokenizer.decode(row, skip_special_tokens=True)
    return found


def _prompt(asked: list[dict[str, str]] | str, tokenizer: Tokenizer) -> list[int]:
    if isinstance(asked, str):
        return tokenizer.encode(asked)
    return tokenizer.apply_chat_template(asked, tokenize=True, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]


def _answered(row: Row, answer: str) -> Row:
    if "messages" in row.data:
        messages = [*row.data["messages"][:-1], {"role": "assistant", "content": answer}]
        return Row({**row.data, "messages": messages}, row.place)
    return Row({**row.data, "completion": answer}, row.place)


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _read(path: Path) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
