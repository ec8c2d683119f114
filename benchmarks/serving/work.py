"""What all engines are asked, and the folders that they read.

Needs numpy and safetensors alone, for peers in other environments import it, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

RANK = 16
POSITIONS = 512


@dataclass(frozen=True)
class Size:
    """Shape of a Llama."""

    hidden: int
    inner: int
    layers: int
    heads: int
    vocabulary: int = 4096

    def linears(self) -> Iterator[tuple[str, int, int]]:
        """Yield name, inputs and outputs of every linear that adapters change."""
        for layer in range(self.layers):
            for name in "qkvo":
                yield f"model.layers.{layer}.self_attn.{name}_proj", self.hidden, self.hidden
            for name in ("gate", "up"):
                yield f"model.layers.{layer}.mlp.{name}_proj", self.hidden, self.inner
            yield f"model.layers.{layer}.mlp.down_proj", self.inner, self.hidden


SIZES = {
    "tiny": Size(64, 176, 2, 4, 512),
    "17M": Size(512, 1408, 4, 8),
    "111M": Size(1024, 2816, 8, 16),
}


@dataclass(frozen=True)
class Case:
    """Requests that arrive at once.

    Attributes:
        requests: how many.
        adapters: distinct ones, taken in turn; 0 asks the base.
        answer: tokens of each answer; with 1 the tokens of the prompts are what is counted.
        prompt: tokens of each prompt.
        rounds: times that the same is asked, one after the other.
        engine: of ours that answers: `small` knows as many adapters as are asked at most, `large` a thousand.
    """

    requests: int
    adapters: int
    answer: int = 32
    prompt: int = 32
    rounds: int = 1
    engine: str = "small"

    @property
    def tokens(self) -> int:
        """Tokens that are counted."""
        return self.rounds * self.requests * (self.answer if self.answer > 1 else self.prompt)

    @property
    def models(self) -> list[str | None]:
        """The adapter of each request; `None` is the base."""
        return [f"a{i % self.adapters}" if self.adapters else None for i in range(self.requests)]

    def prompts(self, size: Size) -> list[list[int]]:
        """Return the token ids of each prompt."""
        ids = np.random.default_rng(7).integers(3, size.vocabulary, (self.requests, self.prompt))
        return [list(map(int, row)) for row in ids]


CASES = {
    "base": Case(16, 0),
    "one adapter": Case(16, 1),
    "16 adapters": Case(16, 16),
    "base, 64": Case(64, 0),
    "64 adapters": Case(64, 64),
    "prefill, base": Case(16, 0, answer=1, rounds=4),
    "prefill, 16 adapters": Case(16, 16, answer=1, rounds=4),
    "8 of 1,000": Case(200, 8, engine="large"),
    "200 of 1,000": Case(200, 200, engine="large"),
}

REGISTERED = 1000
"""Adapters of the large engine."""


def write_base(folder: Path, size: Size) -> Path:
    """Write a random Llama in float32 whose greedy answers are decisive: logits a few units apart."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    h, v, tensors = size.hidden, size.vocabulary, {}
    for name, inputs, outputs in size.linears():
        tensors[f"{name}.weight"] = rng.standard_normal((outputs, inputs), np.float32) * np.float32(1.4 / h**0.5)
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = rng.standard_normal((v, h), np.float32) * np.float32(1.4 / h**0.5)
    norms = [f"model.layers.{i}.{n}_layernorm" for i in range(size.layers) for n in ("input", "post_attention")]
    tensors |= {f"{name}.weight": np.ones(h, np.float32) for name in [*norms, "model.norm"]}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": h,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "vocab_size": v,
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def write_adapter(folder: Path, size: Size, seed: int, rank: int = RANK) -> Path:
    """Write a random LoRA on all linears in PEFT's format, strong enough to change most answers."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([1, seed])
    tensors = {}
    for name, inputs, outputs in size.linears():
        a = rng.standard_normal((rank, inputs), np.float32) * np.float32(inputs**-0.5)
        b = rng.standard_normal((outputs, rank), np.float32) * np.float32(0.2)
        tensors |= {f"base_model.model.{name}.lora_{x}.weight": w for x, w in (("A", a), ("B", b))}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    targets = sorted({name.rpartition(".")[2] for name, _, _ in size.linears()})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return folder


def write_all(folder: Path, size: Size, adapters: int, registered: int) -> Path:
    """Write the base and its adapters, unless they are there; those that nobody asks have rank 1, to save room."""
    if not (folder / "base" / "config.json").is_file():
        write_base(folder / "base", size)
    for seed in range(registered):
        path, config = folder / "adapters" / f"a{seed}", folder / "adapters" / f"a{seed}" / "adapter_config.json"
        is_there = config.is_file() and (seed >= adapters or json.loads(config.read_text())["r"] == RANK)
        if not is_there:
            write_adapter(path, size, seed, RANK if seed < adapters else 1)
    return folder
