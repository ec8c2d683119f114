"""A base whose frozen weights are held in few bits, as QLoRA trains adapters on (2305.14314); by bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch
from peft import prepare_model_for_kbit_training

from toolkit.models.load import LoadedModel, explained, load_tokenizer, model_folder, quiet_transformers


def load_quantized(source: Any, kind: str, *, device: torch.device, trust_remote_code: bool = False) -> LoadedModel:
    """Load a causal language model in few bits, its norms in float32.

    Args:
        source: a folder or a hub id, of weights that are not quantized yet.
        kind: `nf4` and `fp4` take 4 bits a weight, with block scales that are quantized too; `int8` takes 8.
        device: a GPU.
        trust_remote_code: run code that comes with the model.

    Raises:
        MissingError: nothing there.
        CheckpointError: weights that are broken or not those of the config.
        UnsupportedError: not a causal language model, or bitsandbytes cannot be used.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    path = model_folder(source, code=trust_remote_code)
    with explained(source), quiet_transformers():
        config = BitsAndBytesConfig(load_in_8bit=True) if kind == "int8" else _four_bits(kind)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            quantization_config=config,
            device_map={"": device},
            dtype=torch.bfloat16,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return LoadedModel(str(source), model.eval(), load_tokenizer(source, trust_remote_code=trust_remote_code))


def _four_bits(kind: str) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
