"""What is trained in the measurements: random Llamas, rows of a length, and real rows in tokens that are words."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.data.rows import read_rows, write_rows

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 262},
    "3M": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 1024},
    "8M": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "vocab_size": 8192},
}
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
CONTEXT = 1 << 15


def write_model(folder: Path, size: str, tokenizer: Any = None) -> Path:
    """Write a random Llama, float32, with the tokenizer of bytes by default; one that is there stays."""
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from toolkit.embedded.tokenizer import build_tokenizer

    tokenizer = tokenizer or build_tokenizer(CONTEXT)
    sizes = SIZES[size] | ({"vocab_size": len(tokenizer)} if len(tokenizer) > SIZES[size]["vocab_size"] else {})
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**(sizes | heads | ids))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_even_rows(file: Path, count: int, tokens: int) -> Path:
    """Write rows of text that all have so many tokens of the tokenizer of bytes, its end token included."""
    rng = random.Random(0)
    rows = [{"text": "".join(rng.choices("abcdefgh ", k=tokens - 1))} for _ in range(count)]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_rows(file, rows)
    return file


def word_tokenizer(files: Sequence[Path], size: int = 4000) -> Any:
    """Return a tokenizer whose tokens are the commonest words and marks of some files."""
    from collections import Counter

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split, counts = pre_tokenizers.Whitespace(), Counter[str]()
    for file in files:
        for row in read_rows(file):
            counts.update(word for value in row.data.values() for word, _ in split.pre_tokenize_str(str(value)))
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    words = [*special, *(word for word, _ in counts.most_common(size))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))  # pyright: ignore[reportCallIssue]
    inner.pre_tokenizer = split  # pyright: ignore[reportAttributeAccessIssue]
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=CONTEXT, **names)


def in_process(module: str, options: Mapping[str, Any], *, threads: int = 1) -> dict[str, Any]:
    """Run a module of this folder in a process of its own; return the JSON of its last line.

    Raises:
        RuntimeError: it failed; its last lines are in the message.
    """
    import os

    command = [sys.executable, "-m", f"benchmarks.training.{module}", json.dumps(dict(options), default=str)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise RuntimeError(f"{module} ended with {run.returncode}:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])
