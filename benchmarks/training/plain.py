"""transformers' Trainer and PEFT as their documents have it, in a process of its own: the other side of the speed."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

from benchmarks.training.work import LORA
from toolkit.data.rows import read_rows


def train(options: dict[str, Any]) -> dict[str, Any]:
    """Train a LoRA from files to a folder; return CPU seconds, tokens and the last loss."""
    started = time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(options["base"])
    model = AutoModelForCausalLM.from_pretrained(options["base"], dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))
    rows = []
    for row in read_rows(options["data"]):
        ids = [*tokenizer(row.data["text"])["input_ids"], tokenizer.eos_token_id]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids})
    arguments = TrainingArguments(
        output_dir=options["out"],
        per_device_train_batch_size=options["batch_size"],
        max_steps=options["steps"],
        learning_rate=1e-3,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator)  # pyright: ignore[reportArgumentType]
    result = trainer.train()
    model.save_pretrained(options["out"])
    tokens = options["steps"] * options["batch_size"] * len(rows[0]["input_ids"])
    return {"cpu": time.process_time() - started, "tokens": tokens, "loss": result.training_loss}


if __name__ == "__main__":
    print(json.dumps(train(json.loads(sys.argv[1]))))
