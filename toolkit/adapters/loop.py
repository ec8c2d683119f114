"""The training loop: transformers' Trainer, with checkpoints that hold all that is trained, and exact losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer

from toolkit.adapters.state import load_trained_state, save_adapter, trained_state
from toolkit.data.batches import batch_order
from toolkit.data.render import IGNORED

TRAINED = "trained.pt"
"""In a checkpoint beside PEFT's own files, which are for use: of a reparametrised prompt they hold what comes out of
the network that is trained, and of a method that drops ranks not why."""


class Order(Sampler[int]):
    """The order of rows in each epoch.

    Args:
        lengths: tokens of each row.
        size: rows of a batch.
        seed: of the order.
        by_length: put rows of like length into a batch.
    """

    def __init__(self, lengths: Sequence[int], size: int, *, seed: int, by_length: bool) -> None:
        self.lengths, self.size, self.seed, self.by_length = lengths, size, seed, by_length
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(batch_order(self.lengths, self.size, seed=self.seed, epoch=self.epoch, by_length=self.by_length))

    def set_epoch(self, epoch: int) -> None:
        """Go to another epoch; accelerate calls this."""
        self.epoch = epoch


class AdapterTrainer(Trainer):
    """A Trainer whose checkpoints bring back what was trained, and whose validation loss is a mean over tokens."""

    def __init__(self, *args: Any, order: Order, **kwargs: Any) -> None:
        self.order = order
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return self.order

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self._holds_adapter():
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            save_adapter(self._peft_model(), folder)
            torch.save(trained_state(self._peft_model()), folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._holds_adapter():
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # pyright: ignore[reportArgumentType]
            return
        load_trained_state(self._peft_model(), Path(resume_from_checkpoint) / TRAINED)

    def _load_best_model(self) -> None:
        if not self._holds_adapter():
            super()._load_best_model()
            return
        load_trained_state(self._peft_model(), Path(str(self.state.best_model_checkpoint)) / TRAINED)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, and put the mean over all trained tokens in the place of the mean over batches."""
        self._total = torch.zeros(2, dtype=torch.float64)
        with torch.random.fork_rng(devices=[]):  # training goes on as if there had been no evaluation
            output = super().evaluation_loop(*args, **kwargs)
        total, count = self.accelerator.reduce(self._total.to(self.args.device), "sum").tolist()  # pyright: ignore[reportAttributeAccessIssue]
        assert output.metrics is not None
        output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = total / count
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the loss of one batch, without what a method adds to it in training; count its tokens."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs, use_cache=False).logits
        total = token_loss(logits, labels)
        count = (labels[:, 1:] != IGNORED).sum()
        self._total += torch.stack([total, count]).double().cpu()
        return total / count.clamp(min=1), None, None

    def _holds_adapter(self) -> bool:
        return isinstance(self._peft_model(), PeftModel) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _peft_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross-entropy of the trained tokens.

    Args:
        logits: `[B, V + T, N]`, of which the first `V` belong to virtual tokens.
        labels: `[B, T]`, -100 where a token is not trained.
    """
    logits = logits[:, -labels.shape[1] :][:, :-1].flatten(0, 1).float()
    return nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
