"""Every kind of variant of a tiny base, and the model that each of them is, made by somebody else's code."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests import tiny
from tests.adapters.laws import config_of
from toolkit.checkpoints.compressed import on_base, open_compressed
from toolkit.checkpoints.reader import Checkpoint, open_checkpoint
from toolkit.merge.extract import extract
from toolkit.models.load import quiet_transformers
from toolkit.serving.mix import parse_model

FEED_FORWARD = ["down_proj"]
KINDS: dict[str, Any] = {
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=FEED_FORWARD),
    "loha": LoHaConfig(r=3, alpha=6, target_modules=["q_proj", "v_proj"]),
    "lokr": LoKrConfig(r=3, alpha=6, target_modules=["o_proj", "gate_proj"]),
    "oft": OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj", "v_proj"]),
    "vera": VeraConfig(r=8, target_modules=["q_proj"], d_initial=0.5),
}
LORAS: dict[str, Any] = {
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
}


UNMERGED = ("prefix", "prompt", "p_tuning", "bottleneck", "ladder")
"""Variants that change no weight and cannot be combined: what comes before the prompt, and passes of their own."""


def save_kind(base: Path, folder: Path, config: Any, seed: int, strength: float = 0.2) -> Path:
    """Write an adapter of any method of PEFT's, with random weights."""
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config.task_type = "CAUSAL_LM"
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in (p for p in model.parameters() if p.requires_grad):
                value.add_(torch.randn(value.shape, generator=generator) * strength)
        model.save_pretrained(folder)
    return folder


def save_all(base: Path, root: Path) -> dict[str, Path | str]:
    """Write one variant of every kind; return folders by name."""
    found: dict[str, Path | str] = {}
    for i, (name, config) in enumerate(LORAS.items()):
        found[name] = tiny.save_lora(base, root / name, seed=20 + i, **config)
    for i, (name, config) in enumerate(KINDS.items()):
        found[name] = save_kind(base, root / name, config, seed=40 + i)
    own = {"bottleneck": config_of("bottleneck", size=4), "ladder": config_of("lst", reduction=4)}
    for i, (name, config) in enumerate(own.items()):
        found[name] = save_kind(base, root / name, config, seed=64 + i, strength=0.3)
    found["prompt"] = save_kind(base, root / "prompt", PromptTuningConfig(num_virtual_tokens=4), seed=61, strength=1)
    found["p_tuning"] = save_kind(
        base, root / "p_tuning", PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8), seed=62, strength=0.5
    )
    found["prefix"] = save_kind(base, root / "prefix", PrefixTuningConfig(num_virtual_tokens=5), seed=60, strength=1)
    model = AutoModelForCausalLM.from_pretrained(base)
    for i, name in enumerate(("tuned", "other")):
        found[name] = tiny.save_model(tiny.tuned(model, i, 0.05), root / name)
    for kind in ("mask", "bit"):
        tuned = {"one": str(found["tuned"]), "two": str(found["other"])} if kind == "mask" else str(found["tuned"])
        extract(str(base), tuned, root / kind, kind=kind, quiet=True)
    found["mask"], found["bit"] = f"{root / 'mask'}#two", root / "bit"
    extract(str(base), str(found["tuned"]), root / "svd", kind="svd", quiet=True, rank=6)
    found["svd"] = root / "svd"
    return found


def _read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    info = checkpoint.info(name)
    out = np.empty(info.count, np.float32)
    checkpoint.read(name, 0, info.count, out)
    return torch.from_numpy(out).view(info.shape)


class Oracle:
    """Models with a variant, or a composition of several, folded into their weights."""

    def __init__(self, base: Path, variants: dict[str, Any]) -> None:
        self.base, self.variants = base, variants
        self.model = cache(self._model)

    def _model(self, name: str) -> PreTrainedModel:
        parts = parse_model(name)
        if not parts:
            return tiny.load_merged(self.base, None)
        if len(parts) == 1 and parts[0][1] == 1:
            return self._one(parts[0][0])
        model = tiny.load_merged(self.base, None)
        states = [(weight, self.model(part).state_dict()) for part, weight in parts]
        with torch.no_grad():
            for key, value in model.state_dict().items():
                own = value.double()
                value.copy_(own + sum(weight * (state[key].double() - own) for weight, state in states))
        return model

    def _one(self, name: str) -> PreTrainedModel:
        source = self.variants[name]
        folder = Path(str(source).partition("#")[0])
        if (folder / "delta_config.json").is_file():
            model = tiny.load_merged(self.base, None)
            with open_checkpoint(self.base) as base, on_base(base, open_compressed(source)) as whole:
                model.load_state_dict({key: _read(whole, key) for key in whole.tensors})
            return model
        if name in UNMERGED:
            with quiet_transformers():
                return PeftModel.from_pretrained(tiny.load_merged(self.base, None), str(folder))
        if not (folder / "adapter_config.json").is_file():
            return tiny.load_merged(folder, None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return tiny.load_merged(self.base, folder)

    def greedy(self, name: str, prompt: list[int], count: int) -> list[int]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Position ids are not supported")  # PEFT makes them anew
            return tiny.greedy(self.model(name), prompt, count)
