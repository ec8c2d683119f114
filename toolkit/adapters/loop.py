"""The training loop: transformers' Trainer, with a run's objective and methods, checkpoints that hold all that is
trained, and exact losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from toolkit.adapters.loader import Loader, Order, Rows, Steps
from toolkit.adapters.objectives._base import Measures
from toolkit.adapters.parts import Parts
from toolkit.adapters.state import load_trained_state, save_adapter, trained_state
from toolkit.adapters.training._base import Course
from toolkit.data.groups import num_tokens
from toolkit.data.render import IGNORED

TRAINED = "trained.pt"
"""In a checkpoint beside PEFT's own files, which are for use: of a reparametrised prompt they hold what comes out of
the network that is trained, and of a method that drops ranks not why."""

METHODS = "methods.pt"
"""In a checkpoint: what the training methods go on from."""


class AdapterTrainer(Trainer):
    """A Trainer that follows an objective and training methods.

    Args:
        parts: objective and methods.
        batches: order of the rows in memory, or the steps of a stream.
        course: what is known of the run, but for the number of steps.
        task_ids: the model itself is told the task of each row.
        mean_of_batch: the model's own loss is a mean over its batch, to which a method of PEFT adds.

    Attributes:
        tokens_seen: tokens in all batches of this process so far, padding left out.
    """

    def __init__(
        self,
        *args: Any,
        parts: Parts,
        batches: Order | Steps,
        course: Course,
        task_ids: bool = False,
        mean_of_batch: bool = False,
        **kwargs: Any,
    ) -> None:
        self.parts, self.batches, self.course = parts, batches, course
        self.task_ids, self.mean_of_batch = task_ids, mean_of_batch
        self.tokens_seen = 0
        self._sums: dict[str, Tensor] = {}
        super().__init__(*args, **kwargs)
        self.loss_is_scaled_for_ga = not mean_of_batch

    def get_train_dataloader(self) -> Loader:
        """Return this process's batches."""
        if isinstance(self.batches, Steps):
            return Loader(self.batches, batch_size=None, collate_fn=self._counted)
        return Loader(Rows(self.train_dataset), batch_sampler=self.batches, collate_fn=self._counted)  # pyright: ignore[reportArgumentType]

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Loader:
        """Return this process's part of the rows that are evaluated, each once over all processes."""
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        order = Order([len(row.tokens) for row in rows], self.args.per_device_eval_batch_size, seed=None)
        return Loader(Rows(rows), batch_sampler=order, collate_fn=self.data_collator)

    def _counted(self, items: list[Any]) -> dict[str, Tensor]:
        self.tokens_seen += sum(map(num_tokens, items))
        return self.data_collator(items)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Return the micro-batches of a step, after the methods have seen them."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        for method in self.parts.methods:
            method.begin_step(self, batches)
        return batches, count

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Tensor | None:
        """Return over how many things the loss of a step is a mean, those of all processes included."""
        if not batch_samples:
            return None
        return self.summed(
            sum((self.parts.objective.count(b) for b in batch_samples), torch.zeros((), dtype=torch.long))
        )

    def summed(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        value = value.to(self.args.device)
        return self.accelerator.reduce(value, "sum") if self.args.world_size > 1 else value  # pyright: ignore[reportReturnType]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Add the gradients of a micro-batch, by way of the methods."""

        def ordinary(given: dict[str, Any]) -> Tensor:
            return super(AdapterTrainer, self).training_step(model, given, num_items_in_batch)

        return self._through("step", model, self._prepare_inputs(inputs), ordinary)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return a micro-batch's part of the loss of its step, by way of the methods."""

        def own(given: dict[str, Any]) -> Tensor:
            return self.parts.objective.loss(self, model, self.for_model(given), num_items_in_batch)

        loss = self._through("loss", model, inputs, own)
        # Gradients of several processes are averaged, but this is a part of a sum.
        return loss if self.mean_of_batch else loss * self.args.world_size

    def _through(
        self, hook: str, model: nn.Module, inputs: dict[str, Any], last: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        """Call a hook of all methods, each around the next."""
        call = last
        for method in reversed(self.parts.methods):
            call = partial(getattr(method, hook), self, model, proceed=call)
        return call(inputs)

    def own_loss(self, model: nn.Module, inputs: dict[str, Any], count: Any) -> Tensor:
        """Return the loss over tokens: the mean over `count`, or over the batch with what a method of PEFT adds."""
        if self.mean_of_batch:
            return model(**inputs).loss
        if self.parts.filling("token_losses") is not None or not self.model_accepts_loss_kwargs:
            return self.token_losses(model, inputs).sum() / count
        return model(**inputs, num_items_in_batch=count).loss

    def token_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Return the cross-entropy of every trained token, `[B, T - 1]` float32, 0 elsewhere."""
        filling = self.parts.filling("token_losses")
        inputs = self.for_model(inputs)
        if filling is not None:
            return filling.token_losses(model, inputs)
        labels = inputs["labels"]
        given = {key: value for key, value in inputs.items() if key != "labels"}
        return token_losses(model(**given, use_cache=False).logits, labels)

    def for_model(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch without what only the methods look at."""
        return {key: value for key, value in inputs.items() if key != "task_ids" or self.task_ids}

    def create_optimizer(self, model: Any = None) -> Any:
        """Make the optimizer that a method brings, or transformers' own."""
        filling = self.parts.filling("optimizer")
        if filling is None or self.optimizer is not None:
            return super().create_optimizer(model)
        model = model or self.model
        decayed = set(self.get_decay_parameter_names(model))
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in trained if name in decayed], "weight_decay": self.args.weight_decay},
            {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
        ]
        self.optimizer = filling.optimizer(model, [g for g in groups if g["params"]], self.args.learning_rate)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the course of the learning rate that a method brings, or transformers' own."""
        filling = self.parts.filling("rate")
        if filling is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        course = Course(num_training_steps, self.course.rows, self.course.tokens, self.course.learning_rate)
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, filling.rate(course))
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self._holds_adapter():
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            save_adapter(self.unwrapped(), folder)
            torch.save(trained_state(self.unwrapped()), folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._holds_adapter():
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # pyright: ignore[reportArgumentType]
            return
        load_trained_state(self.unwrapped(), Path(resume_from_checkpoint) / TRAINED)

    def _load_best_model(self) -> None:
        if not self._holds_adapter():
            super()._load_best_model()
            return
        load_trained_state(self.unwrapped(), Path(str(self.state.best_model_checkpoint)) / TRAINED)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self.parts.methods:
            torch.save([method.state() for method in self.parts.methods], Path(output_dir) / METHODS)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.parts.methods:
            states = torch.load(Path(checkpoint) / METHODS, weights_only=True)
            for method, state in zip(self.parts.methods, states, strict=True):
                method.load_state(state)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, and put means over all that is measured in the place of the mean over batches."""
        self._sums = {}
        with torch.random.fork_rng(devices=[]):  # training goes on as if there had been no evaluation
            output = super().evaluation_loop(*args, **kwargs)
        assert output.metrics is not None
        for name, sums in self._sums.items():
            total, count = self.summed(sums).tolist()
            output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_{name}"] = total / count
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the loss of one batch, and add up what is measured on it."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            measured: Measures = self.parts.objective.measure(self, model, self.for_model(inputs))
        for name, pair in measured.items():
            sums = torch.tensor([float(value) for value in pair], dtype=torch.float64)
            self._sums[name] = self._sums.get(name, torch.zeros(2, dtype=torch.float64)) + sums
        total, count = measured["loss"]
        return torch.as_tensor(float(total) / max(float(count), 1.0), device=self.args.device), None, None

    def _holds_adapter(self) -> bool:
        return isinstance(self.unwrapped(), PeftModel) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def unwrapped(self) -> Any:
        """Return the model without what accelerate put around it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of every trained token, `[B, T - 1]` float32, 0 elsewhere.

    Args:
        logits: `[B, V + T, N]`, of which the first `V` belong to virtual tokens.
        labels: `[B, T]`, -100 where a token is not trained.
    """
    logits = logits[:, -labels.shape[1] :][:, :-1].float()
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(len(labels), -1)
