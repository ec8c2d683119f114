"""The encoder with a linear head per task: heads on the untouched encoder, fine-tuning, joint training, accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import get_linear_schedule_with_warmup

from benchmarks.eight_tasks.data import TaskData
from toolkit.data.batches import batch_order
from toolkit.merge.learning.heads import Head, padded, pooled
from toolkit.models.load import LoadedModel, load_encoder, quiet_transformers
from toolkit.progress import track

MAX_LENGTH = 128
"""Tokens; 99 in 100 rows have fewer."""

BATCH = 32
EVALUATED_AT_ONCE = 64
WARMUP = 0.1
"""Share of the steps in which the rate rises."""

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
"""Of the heads' squared weights, which are fitted to standardised features."""

Tokens = list[list[int]]


def load(base: Path) -> LoadedModel:
    """Load an encoder in float32."""
    loaded = load_encoder(base)
    loaded.model.float()
    return loaded


def tokenize(loaded: LoadedModel, texts: Sequence[str]) -> Tokens:
    """Return the tokens of texts, at most `MAX_LENGTH` of each."""
    tokenizer = loaded.tokenizer
    return [tokenizer.encode(text)[:MAX_LENGTH] for text in texts]


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield the numbers of rows of like length."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    for first in range(0, len(order), size):
        yield order[first : first + size]


@torch.inference_mode()
def features(loaded: LoadedModel, tokens: Tokens) -> Tensor:
    """Return the pooled vectors `[N, H]` of rows, in evaluation mode."""
    model = loaded.model.eval()
    found: list[Tensor] = []
    places: list[int] = []
    for rows in batches([len(row) for row in tokens], EVALUATED_AT_ONCE):
        ids, mask = padded([tokens[row] for row in rows], _pad(loaded), model.device)
        found.append(pooled(model, ids, mask, "mean").cpu())
        places += rows
    return torch.cat(found)[torch.tensor(places).argsort()]


def accuracy(loaded: LoadedModel, head: Head, tokens: Tokens, targets: Sequence[int]) -> float:
    """Return the percent of rows that are classified right."""
    predicted = head(features(loaded, tokens)).argmax(-1)
    return 100 * int((predicted == torch.tensor(targets)).sum()) / len(targets)


def fit_head(vectors: Mapping[str, Tensor], task: TaskData) -> Head:
    """Fit a head to the untouched encoder's features: logistic regression, of several penalties the one that predicts
    the validation rows best, by their likelihood. A head that overfits would be sure of wrong answers, and stays so.

    Args:
        vectors: `[N, H]` of the training and of the validation rows.
        task: whose labels they have.
    """
    mean, deviation = vectors["train"].mean(0), vectors["train"].std(0) + 1e-6
    x = {split: (values - mean) / deviation for split, values in vectors.items()}
    y = {split: torch.tensor(task.targets[split]) for split in x}
    fitted = [_regress(x["train"], y["train"], len(task.labels), penalty) for penalty in PENALTIES]
    losses = [float(functional.cross_entropy(x["validation"] @ w.T + b, y["validation"])) for w, b in fitted]
    weight, bias = fitted[losses.index(min(losses))]
    own = weight / deviation
    return Head(own, bias - own @ mean, task.labels)


def _regress(x: Tensor, y: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Return the weight `[C, H]` and bias `[C]` of least penalised cross-entropy, by L-BFGS."""
    weight, bias = torch.zeros(classes, x.shape[1], requires_grad=True), torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(x @ weight.T + bias, y) + penalty * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def fine_tune(
    loaded: LoadedModel,
    heads: Mapping[str, Head],
    targets: Mapping[str, Sequence[int]],
    tokens: Mapping[str, Tokens],
    *,
    epochs: int,
    rate: float,
    seed: int,
    label: str,
    quiet: bool = False,
) -> None:
    """Train the encoder on one task, or on several at once, a batch of one at a time; heads stay as they are.

    Args:
        loaded: whose model is trained, all that requires gradients.
        heads: of the tasks.
        targets: right classes of the training rows of each task that is trained.
        tokens: of these rows.
        epochs: passes over all rows.
        rate: largest learning rate of AdamW; it rises at first and then falls to 0.
        seed: of the order of the rows and of dropout.
        label: for the progress.
        quiet: show no progress.
    """
    torch.manual_seed(seed)
    model = loaded.model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01, fused=True)
    steps = [step for epoch in range(epochs) for step in _epoch(tokens, seed, epoch)]
    schedule = get_linear_schedule_with_warmup(optimizer, int(WARMUP * len(steps)), len(steps))
    with track(label, len(steps), unit="steps", quiet=quiet) as progress:
        for name, rows in steps:
            ids, mask = padded([tokens[name][row] for row in rows], _pad(loaded), model.device)
            logits = heads[name](pooled(model, ids, mask, "mean"))
            loss = functional.cross_entropy(logits, torch.tensor([targets[name][row] for row in rows]))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress.note(f"loss {float(loss.detach()):.3f}")
            progress.advance()
    model.eval()


def _epoch(tokens: Mapping[str, Tokens], seed: int, epoch: int) -> list[tuple[str, list[int]]]:
    """Return every batch of one pass over all tasks, in random order."""
    found: list[tuple[str, list[int]]] = []
    for name, rows in tokens.items():
        order = batch_order([len(row) for row in rows], BATCH, seed=seed, epoch=epoch, by_length=True)
        found += [(name, order[first : first + BATCH]) for first in range(0, len(order), BATCH)]
    mixed = batch_order([1] * len(found), 1, seed=seed, epoch=epoch, by_length=False)
    return [found[index] for index in mixed]


def with_lora(loaded: LoadedModel, rank: int, seed: int) -> Any:
    """Put a LoRA on every linear of an encoder, in place; return PEFT's model of it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="FEATURE_EXTRACTION")
    with quiet_transformers():
        return get_peft_model(loaded.model, config)


def save(loaded: LoadedModel, folder: Path) -> None:
    """Write an encoder and its tokenizer."""
    with quiet_transformers():
        loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def _pad(loaded: LoadedModel) -> int:
    return int(loaded.tokenizer.pad_token_id or 0)
