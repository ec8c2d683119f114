"""Small models and adapters, made in memory from seeds, and written as the folders that users have."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from toolkit.embedded.tokenizer import VOCAB_SIZE, build_tokenizer
from toolkit.models.load import quiet_transformers

CONTEXT = 256


def llama_config(**changes: Any) -> LlamaConfig:
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
        "tie_word_embeddings": False,
        # Random weights of the usual size give nearly equal logits; larger ones make greedy decoding decisive.
        "initializer_range": 0.2,
    }
    return LlamaConfig(**(sizes | changes))


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(**changes)).eval()


def save_model(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    with quiet_transformers():
        model.save_pretrained(folder, **options)
    build_tokenizer(CONTEXT).save_pretrained(folder)
    return folder


def tuned(model: LlamaForCausalLM, seed: int, scale: float = 0.02) -> LlamaForCausalLM:
    """Return a full fine-tune: the model with every weight changed."""
    copy = LlamaForCausalLM(model.config).to(model.dtype).eval()
    copy.load_state_dict(model.state_dict())
    torch.manual_seed(1000 + seed)
    with torch.no_grad():
        for value in copy.parameters():
            value.add_((torch.randn(value.shape) * scale).to(value.dtype))
    return copy


def save_lora(base: Path, folder: Path, seed: int = 0, strength: float = 0.3, **config: Any) -> Path:
    """Write a LoRA with random factors, made and saved by PEFT itself."""
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    with quiet_transformers(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        model = AutoModelForCausalLM.from_pretrained(base)
        adapted = get_peft_model(model, LoraConfig(**(options | config)))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, value in adapted.named_parameters():
                if "lora_A" in name or "lora_B" in name or "lora_embedding" in name:
                    value.copy_(torch.randn(value.shape, generator=generator) * strength)
                elif "magnitude" in name or "modules_to_save" in name:
                    value.mul_(1 + 0.3 * torch.rand(value.shape, generator=generator))
        adapted.save_pretrained(folder)
    return folder


def load_merged(base: Path, adapter: Path | None) -> PreTrainedModel:
    """Load a base with an adapter folded into its weights by PEFT."""
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return model


def greedy(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """Continue a prompt greedily with transformers' own generate, ignoring end tokens."""
    with torch.inference_mode(), quiet_transformers():
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
    return out[0, len(ids) :].tolist()
