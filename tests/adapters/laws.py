"""What the tests of adapter methods share: the example that each declares, tiny models, and adapters on them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, PeftType, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import toolkit.adapters  # noqa: F401 - makes PEFT know the methods

LAYERS, HIDDEN, INNER, KEYS = 3, 48, 96, 24
"""Of `tiny.llama()`; `KEYS` is the width of its keys and values."""

LINEARS = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (HIDDEN, KEYS),
    "v_proj": (HIDDEN, KEYS),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (HIDDEN, INNER),
    "up_proj": (HIDDEN, INNER),
    "down_proj": (INNER, HIDDEN),
}
"""`(in, out)` of the linears of one of its layers."""

IDS = torch.tensor([[5, 9, 101, 32, 77, 3, 250, 18], [44, 7, 7, 90, 13, 200, 1, 64]])


@dataclass(frozen=True)
class Example:
    """How the laws run a method; every test of a method declares one as `EXAMPLE`.

    Attributes:
        config: fields of the method, for `tiny.llama()` and for `gpt2()`.
        count: trained parameters on `tiny.llama()`, by the formula of the paper.
        starts_at_base: a new adapter changes nothing, to the bit.
        folds: it is a change of weights.
        is_lora: it is a pair of factors on a base without biases.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    count: int = 0
    starts_at_base: bool = True
    folds: bool = True
    is_lora: bool = True


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """A model whose linears are stored transposed and have biases that are not zero."""
    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=3, n_embd=48, n_head=4, n_positions=64, vocab_size=259, bos_token_id=256, eos_token_id=257
    )
    model = GPT2LMHeadModel(config).eval()
    for name, value in model.named_parameters():
        if "bias" in name:
            value.data.normal_(0, 0.2)
    return model


def config_of(method: str, **fields: Any) -> PeftConfig:
    kind: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.upper())]
    return kind(task_type="CAUSAL_LM", **fields)


def attach(model: PreTrainedModel, method: str, **fields: Any) -> PeftModel:
    """Put a new adapter on a model, always the same."""
    torch.manual_seed(1)
    return get_peft_model(model, config_of(method, **fields)).eval()


def randomise(model: torch.nn.Module, seed: int = 2, strength: float = 0.2, adapter: str = "default") -> None:
    """Fill an adapter with random numbers."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if f".{adapter}" in name:
            value.data = (torch.randn(value.shape, generator=generator) * strength).to(value.dtype)


def logits(model: torch.nn.Module, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


def save(model: PeftModel, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Could not find a config file")
        model.save_pretrained(folder)
    return folder


def grads(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients of a language-modelling loss, by the names of parameters that have one."""
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_bits(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Compare to a share of the largest value."""
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
