"""Tiny learned merges: a base, fine-tunes of it in every form, encoders with heads, and rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel

from tests import tiny
from toolkit.embedded.tokenizer import VOCAB_SIZE
from toolkit.merge.extract import extract
from toolkit.merge.learning.blocks import Blocks
from toolkit.merge.learning.engine import Engine, base_model
from toolkit.merge.learning.heads import Head, write_head
from toolkit.merge.learning.vectors import TaskVectors

HIDDEN = 24


def bert(seed: int = 0) -> BertModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return BertModel(
        BertConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=64, initializer_range=0.2, **sizes)
    ).eval()


def shifted(model: torch.nn.Module, seed: int, scale: float, pattern: str = "") -> None:
    """Change every weight whose name holds a pattern, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if pattern in name:
                value.add_(torch.randn(value.shape, generator=generator) * scale)


def encoders(folder: Path, count: int, scale: float = 0.05) -> tuple[Path, dict[str, str]]:
    """Write a tiny encoder and fine-tunes of it, by name."""
    base = tiny.save_model(bert(), folder / "base")
    models = {}
    for index in range(count):
        model = bert()
        shifted(model, index + 1, scale)
        models[f"task{index}"] = str(tiny.save_model(model, folder / f"task{index}"))
    return base, models


def head(folder: Path, seed: int, labels: Sequence[str] = ("yes", "no", "maybe")) -> str:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(len(labels), HIDDEN, generator=generator)
    return str(write_head(Head(weight, torch.zeros(len(labels)), tuple(labels)), folder))


def rows(file: Path, data: Sequence[Mapping[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in data))
    return str(file)


def labelled(file: Path, count: int = 12, labels: Sequence[str] = ("yes", "no", "maybe")) -> str:
    return rows(file, [{"text": f"number {i * 37 % 101}", "label": labels[i % len(labels)]} for i in range(count)])


def classification(folder: Path, tasks: int = 2, count: int = 12) -> dict[str, Any]:
    """Return the models and tasks of a spec: encoders, each with a head and rows of its own."""
    base, models = encoders(folder, tasks)
    given = {
        name: {"data": labelled(folder / f"{name}.jsonl", count), "head": head(folder / f"head{i}", i)}
        for i, name in enumerate(models)
    }
    return {"base_model": str(base), "models": models, "tasks": given, "device": "cpu"}


def every_form(base: Path, folder: Path) -> dict[str, str]:
    """Return a full fine-tune, a LoRA folder and two fine-tunes held as masks, by name."""
    full = tiny.save_model(tiny.tuned(tiny.llama(), 1), folder / "full")
    other = tiny.save_model(tiny.tuned(tiny.llama(), 2), folder / "other")
    lora = tiny.save_lora(base, folder / "lora", seed=3, target_modules=["q_proj", "down_proj"])
    extract(base, {"one": full, "two": other}, folder / "masks", kind="mask", quiet=True)
    return {"full": str(full), "lora": str(lora), "masked": f"{folder / 'masks'}#two"}


def engine(base: Path | str, models: Mapping[str, str], *, encoder: bool = False, **params: Any) -> Engine:
    vectors = TaskVectors(str(base), models)
    blocks = Blocks(list(vectors.jobs), params.get("granularity", "task"), params.get("groups"))
    return Engine(vectors, blocks, base_model(vectors, torch.device("cpu"), encoder=encoder))


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    from toolkit.checkpoints.reader import open_checkpoint

    with open_checkpoint(str(folder)) as checkpoint:
        return {name: checkpoint.tensor(name) for name in checkpoint.tensors}
