"""Check that a row can be asked, before anything is: what an engine would refuse is told with the row's place."""

from __future__ import annotations

from typing import Any

from toolkit.data.rows import Row, split_answer
from toolkit.errors import DataError, RequestError
from toolkit.serving.engine import Engine
from toolkit.serving.prompts import encode_prompt


def check_prompt(engine: Engine, row: Row, max_tokens: int, key: str = "max_tokens") -> None:
    """Check that an engine can answer a row.

    Args:
        engine: that will be asked.
        row: with a prompt and an answer.
        max_tokens: most tokens of the answer.
        key: that sets them in the spec.

    Raises:
        DataError: the row has no prompt or no answer, or they take more tokens than the model does.
    """
    prompt, _ = split_answer(row)
    embedding: Any = engine.model.get_input_embeddings()
    try:
        ids, _ = encode_prompt(engine.tokenizer, prompt, embedding.weight.shape[0])
    except RequestError as error:
        raise DataError(f"{row.place}: {error}") from None
    if not ids:
        raise DataError(f"{row.place}: the prompt is empty")
    if len(ids) + max_tokens > engine.max_model_len:
        raise DataError(
            f"{row.place}: {len(ids)} tokens of prompt and {max_tokens} of answer are more than the"
            f" {engine.max_model_len} that the model takes; shorten the row, or lower {key}"
        )
