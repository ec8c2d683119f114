"""Turn rows into tokens and labels, so that exactly the wanted tokens are trained.

- `messages`: through the tokenizer's chat template; trained are the spans that it marks with `{% generation %}`.
- `prompt` and `completion`: the completion and the end-of-text token are trained.
- `text`: everything is trained.

With `train_on_inputs` everything is trained in any row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from toolkit.data.rows import FORMS, Row, messages
from toolkit.data.tokenizer import Tokenizer
from toolkit.errors import DataError

IGNORED = -100
"""Label of a token that is not trained."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Policy = Literal["error", "skip"]


@dataclass(frozen=True)
class Example:
    """One rendered row.

    Attributes:
        tokens: ids.
        labels: ids, or -100 where the token is not trained; the model shifts them.
        task: number of its task, where that matters.
    """

    tokens: list[int]
    labels: list[int]
    task: int = 0

    @property
    def num_trained(self) -> int:
        """Tokens that contribute to the loss; the first token is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass
class RenderReport:
    """What became of the rows of a data set.

    Attributes:
        rows: rows read.
        kept: examples made.
        tokens: of all examples.
        trained: tokens that contribute to the loss.
        truncated: examples that were cut to the longest length.
        skipped: places of rows that were left out, by reason.
    """

    rows: int = 0
    kept: int = 0
    tokens: int = 0
    trained: int = 0
    truncated: int = 0
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def check(self, rows: Sequence[Row]) -> None:
        """Refuse a data set of which nothing is left.

        Raises:
            DataError: all rows were left out.
        """
        if not self.kept:
            raise DataError(f"{rows[0].place}: every row was skipped ({self.to_dict()['skipped']})")

    def to_dict(self) -> dict[str, int | dict[str, int]]:
        """Return the counts."""
        skipped = {reason: len(places) for reason, places in self.skipped.items()}
        return {**{k: v for k, v in vars(self).items() if isinstance(v, int)}, "skipped": skipped}


class Renderer:
    """Renders rows with one tokenizer.

    Args:
        tokenizer: of the model that is trained.
        max_length: most tokens of an example, if the model can take them.
        too_long: what to do with a longer row.
        empty: what to do with a row in which no token is trained.
        train_on_inputs: train prompts as well as answers.
        context: most tokens that the model can take; by default any number.
        whole: what is learned is about a text, not its tokens: no end token closes it, and only one without tokens
            is empty.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_length: int,
        too_long: Literal["error", "truncate", "skip"] = "error",
        empty: Policy = "error",
        *,
        train_on_inputs: bool = False,
        context: int | None = None,
        whole: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length, self.context = min(max_length, context or max_length), context
        self.too_long, self.empty = too_long, empty
        self.train_on_inputs, self.whole = train_on_inputs, whole

    def render_all(self, rows: Sequence[Row]) -> tuple[list[Example], RenderReport]:
        """Render every row.

        Raises:
            DataError: a row that cannot be rendered, or all rows were left out.
        """
        report = RenderReport()
        examples = [example for row in rows for example in self.render_counted([row], report)]
        report.check(rows)
        return examples, report

    def render(self, row: Row) -> Example:
        """Render one row, whatever its length."""
        if "messages" in row.data:
            return self._chat(row)
        if "prompt" in row.data or "completion" in row.data:
            return self._completion(row)
        if isinstance(row.data.get("text"), str):
            tokens = self._encode(row.data["text"])
            tokens = tokens if self.whole else self._with_end(tokens)
            return Example(tokens, list(tokens))
        raise DataError(f"{row.place}: expected {FORMS}, got {', '.join(row.data) or 'no fields'}")

    def render_counted(self, texts: Sequence[Row], report: RenderReport) -> list[Example]:
        """Render the texts of one row, and count what became of it; one that is left out has no examples.

        Raises:
            DataError: a text that cannot be rendered.
        """
        report.rows += 1
        examples = [self._cut(text.place, self.render(text), report) for text in texts]
        if not examples or None in examples:
            return []
        kept = [example for example in examples if example is not None]
        report.kept += 1
        report.tokens += sum(len(e.tokens) for e in kept)
        report.trained += sum(e.num_trained for e in kept)
        return kept

    def _cut(self, place: str, example: Example, report: RenderReport) -> Example | None:
        """Return an example of a length that can be trained; `None` where the row is to be left out."""
        if len(example.tokens) > self.max_length:
            if self.too_long == "error":
                raise DataError(f"{place}: {len(example.tokens)} tokens, but {self._limit()} truncate or skip")
            if self.too_long == "skip":
                report.skipped.setdefault("too_long", []).append(place)
                return None
            report.truncated += 1
            example = Example(example.tokens[: self.max_length], example.labels[: self.max_length])
        if not (example.tokens if self.whole else example.num_trained):
            if self.empty == "error":
                what = "has no tokens" if self.whole else "no token of this row is trained"
                raise DataError(f"{place}: {what}; set data.empty to skip to leave it out")
            report.skipped.setdefault("empty", []).append(place)
            return None
        return example

    def _limit(self) -> str:
        if self.max_length == self.context:
            return f"the model takes at most {self.context}; shorten the row, or set data.too_long to"
        return f"max_length is {self.max_length}; raise it, or set data.too_long to"

    def _chat(self, row: Row) -> Example:
        chat = messages(row)
        template = self.tokenizer.chat_template
        if not template:
            raise DataError(f"{row.place}: a row of messages, but the tokenizer has no chat template")
        if not self.train_on_inputs and not _GENERATION.search(str(template)):
            raise DataError(
                "the tokenizer's chat template has no {% generation %} block, so no token would be trained;"
                " wrap the assistant's content in {% generation %} ... {% endgeneration %}"
            )
        if not self.train_on_inputs and not self.tokenizer.is_fast:
            raise DataError(
                "the tokenizer does not tell which characters a token stands for, so an assistant's tokens cannot be"
                " found; use a fast tokenizer, or set data.train_on_inputs"
            )
        try:
            if self.train_on_inputs:
                tokens = self.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
                return Example(tokens, list(tokens))
            text, spans = self._rendered(chat)
        except Exception as error:  # jinja raises what the template raises
            raise DataError(f"{row.place}: the chat template refuses this row ({error})") from None
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens, offsets = encoded["input_ids"], encoded["offset_mapping"]
        trained = (any(_covers(span, offset) for span in spans) for offset in offsets)
        return Example(tokens, [t if yes else IGNORED for t, yes in zip(tokens, trained, strict=True)])

    def _rendered(self, chat: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a chat and the spans of it, in characters, that the assistant says.

        transformers' own mask of tokens ends with the first token of a span's last character, which may have four,
        and goes on to the end of the text where no token stands for that character.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            conversations=[chat],
            chat_template=self.tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        (text,), (spans,) = rendered
        return text, spans

    def _completion(self, row: Row) -> Example:
        prompt, completion = row.data.get("prompt"), row.data.get("completion")
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise DataError(f"{row.place}: prompt and completion must both be text")
        asked = self._encode(prompt)
        answer = self._with_end(self._encode(completion, special=False)) if completion else []
        return Example(asked + answer, (asked if self.train_on_inputs else [IGNORED] * len(asked)) + answer)

    def _encode(self, text: str, special: bool = True) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=special)

    def _with_end(self, tokens: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return tokens if end is None or tokens[-1:] == [end] else [*tokens, end]


def _covers(span: tuple[int, int], offset: tuple[int, int]) -> bool:
    """Tell whether a token stands for characters of a span; of one whose blanks were cut off none are left."""
    (start, stop), (first, last) = span, offset
    return start < last and (first < stop or first == last == stop)
