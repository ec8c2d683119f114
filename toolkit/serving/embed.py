"""Vectors of prompts: the model's own last hidden states, with or without an adapter."""

from __future__ import annotations

from typing import Literal

import torch

from toolkit.errors import RequestError
from toolkit.serving.engine import Engine
from toolkit.serving.mix import AUTO
from toolkit.serving.prompts import Prompt, encode_prompt

Pooling = Literal["last", "mean"]


def embed(
    engine: Engine, prompt: Prompt, model: str, *, pooling: Pooling = "last", normalize: bool = True
) -> tuple[list[float], int]:
    """Return the vector of a prompt, and the tokens of the prompt.

    The prompt runs in a forward pass of its own, between two steps of the engine.

    Args:
        engine: in whose thread this runs.
        prompt: a text or token ids.
        model: `base`, an adapter or a composition.
        pooling: take the hidden state, after the last norm, of the last token, or the mean over all tokens.
        normalize: divide by the Euclidean norm.

    Raises:
        RequestError: unknown model, `auto`, or a prompt that is empty or too long.
    """
    if model == AUTO:
        raise RequestError("vectors of different experts cannot be compared, so ask for one model and not for auto")
    ids, _ = encode_prompt(engine.tokenizer, prompt, engine.runner.vocabulary)
    if not ids:
        raise RequestError("the prompt is empty")
    if len(ids) > engine.max_model_len:
        message = f"{len(ids)} prompt tokens are more than the {engine.max_model_len} that the model takes"
        raise RequestError(message, "context_length_exceeded")
    with engine.using(model) as decoder, torch.inference_mode():
        output = decoder.base_model(input_ids=torch.tensor([ids], device=decoder.device), use_cache=False)
    states = output.last_hidden_state[0].float()
    vector = states[-1] if pooling == "last" else states.mean(dim=0)
    if normalize:
        vector = torch.nn.functional.normalize(vector, dim=0)
    return vector.tolist(), len(ids)
