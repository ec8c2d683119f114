"""Write random models in the shape of a Llama: `python -m benchmarks.models FOLDER [--size NAME] [--tuned N]`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from toolkit.checkpoints.dtypes import Floats, by_torch_name, encode
from toolkit.checkpoints.headers import TensorInfo
from toolkit.checkpoints.writer import WeightsWriter, plan_shards
from toolkit.embedded.tokenizer import build_tokenizer

SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "vocab_size": 512},
    "0.23B": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 14, "vocab_size": 32000},
}
BF16 = by_torch_name("bfloat16")
STEP = 1 << 20


def tensors(sizes: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes, with a quarter as many key and value heads as query heads."""
    hidden, inner, vocabulary = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(sizes["num_hidden_layers"]):
        stem = f"model.layers.{layer}"
        yield f"{stem}.input_layernorm.weight", (hidden,)
        for name, rows in (("q", hidden), ("k", hidden // 4), ("v", hidden // 4), ("o", hidden)):
            yield f"{stem}.self_attn.{name}_proj.weight", (rows, hidden)
        yield f"{stem}.post_attention_layernorm.weight", (hidden,)
        yield f"{stem}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{stem}.mlp.up_proj.weight", (inner, hidden)
        yield f"{stem}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def config(sizes: dict[str, int]) -> dict[str, object]:
    """Return a `config.json` for the model."""
    heads = max(4, sizes["hidden_size"] // 64)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def write(folder: Path, sizes: dict[str, int], seed: int, shard_bytes: int = 200_000_000) -> Path:
    """Write the base (seed 0), or a fine-tune of it: each tensor changed by 5% of its deviation."""
    folder.mkdir(parents=True, exist_ok=True)
    layout = [TensorInfo(name, BF16, shape) for name, shape in tensors(sizes)]
    writer = WeightsWriter(folder, plan_shards(layout, shard_bytes))
    for number, tensor in enumerate(layout):
        base, own = np.random.default_rng([number, 0]), np.random.default_rng([number, seed])
        for start in range(0, tensor.count, STEP):
            size = min(STEP, tensor.count - start)
            values: Floats = base.standard_normal(size, np.float32) * np.float32(0.02)
            if seed:
                values += own.standard_normal(size, np.float32) * np.float32(0.001)
            writer.write(tensor.name, start, encode(values, BF16))
    writer.write_index()
    writer.close()
    (folder / "config.json").write_text(json.dumps(config(sizes), indent=2))
    build_tokenizer(512).save_pretrained(folder)
    return folder


def main() -> None:
    """Write a base and its fine-tunes, those that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="0.23B")
    parser.add_argument("--tuned", type=int, default=3)
    arguments = parser.parse_args()
    for number in range(arguments.tuned + 1):
        folder = arguments.folder / ("base" if number == 0 else f"tuned{number}")
        if not (folder / "config.json").is_file():
            print(write(folder, SIZES[arguments.size], number))


if __name__ == "__main__":
    main()
