"""Balance the losses of several tasks: by tokens, samples or tasks, by difficulty, or by how fast they converge.

MFTCoder (2311.02303) trains one model on many tasks whose data differ in size, difficulty and speed of convergence;
CoBa (2410.06741) sets the weights of the tasks anew at every step. The balances are

- `tokens`: the mean over all tokens (no balance);
- `samples`: the mean over samples of their means over tokens;
- `task_tokens`: the mean over tasks of their means over tokens;
- `task_samples`: the mean over tasks of their means over samples;
- `focal`: the same with `(1 - P)^gamma` before each sample, `P` the mean probability of its tokens;
- `convergence`: `task_tokens` with weights that grow the slower a task's validation loss falls;
- `coba`: the same, turned the other way for tasks that begin to diverge.

Sums and counts are those of the whole step, over its micro-batches and processes. MFTCoder's means are over the tasks
that have rows in the step, so that a rare task weighs less the more steps it is missing from. With `over: data` they
are over all tasks: the rows of a task weigh more the fewer they are among all rows, and what a whole pass adds up to
is balanced exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from toolkit.adapters.dataset import tasks
from toolkit.adapters.spec import TrainSpec
from toolkit.adapters.training._base import TrainingMethod
from toolkit.data.render import IGNORED
from toolkit.errors import Problem
from toolkit.models.modes import evaluating

if TYPE_CHECKING:
    from toolkit.adapters.loop import AdapterTrainer

_MEASURED = ("convergence", "coba")


class Mftcoder(TrainingMethod):
    """Balanced losses."""

    class Params(TrainingMethod.Params):
        """Parameters.

        Attributes:
            balance: see above.
            over: what means over tasks are taken over: the `step`, or all `data` that is trained.
            weights: of tasks, up to a common factor, for the balances that are means over tasks; 1 where not given.
            gamma: of `focal`; 0 is `task_samples`.
            warmup_steps: in which all tasks weigh the same, for `convergence` and `coba`.
            history: measurements through which a line is fitted.
            temperature: of `coba`: how readily it turns from one score to the other.
            every: steps between two measurements.
            rows: validation rows of each task in a measurement, taken in turn.
        """

        balance: Literal["tokens", "samples", "task_tokens", "task_samples", "focal", "convergence", "coba"] = (
            "task_tokens"
        )
        over: Literal["step", "data"] = "step"
        weights: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
        gamma: Annotated[float, Field(ge=0)] = 2.0
        warmup_steps: Annotated[int, Field(ge=0)] = 10
        history: Annotated[int, Field(ge=2)] = 10
        temperature: Annotated[float, Field(gt=0)] = 5.0
        every: Annotated[int, Field(ge=1)] = 1
        rows: Annotated[int, Field(ge=1)] = 8

    params: Params
    needs_tasks = True

    def __init__(self, params: Params, spec: TrainSpec) -> None:
        super().__init__(params, spec)
        self.losses: list[list[float]] = []  # per measurement and task, over those of the first
        self.first: list[float] = []
        self.given = [params.weights.get(task, 1.0) for task in tasks(spec)]
        self.samples = self.tokens = torch.zeros(0)  # of the step, by task
        self.divisors = torch.zeros(0)  # what sums of samples and of tokens are divided by, `[2, tasks]`
        self.all = torch.zeros(0)  # samples and tokens of all data

    def faults(self) -> Iterator[Problem]:
        """Refuse other objectives, unknown tasks, and balances without what they measure."""
        spec, where, known = self.spec, self.where, tasks(self.spec)
        if spec.objective.method != "completion":
            yield Problem(where, "mftcoder balances losses over tokens; it needs objective: completion")
        if self.params.over == "data" and spec.data.streaming:
            yield Problem(f"{where}.over", "over: data counts all rows, and a stream has no end; leave it out")
        for task in self.params.weights:
            if task not in known:
                yield Problem(f"{where}.weights.{task}", f"no task of data.train; they are {', '.join(known)}")
        if self.params.balance in _MEASURED:
            measured = {source.task for source in spec.data.sources(validation=True)}
            missing = [task for task in known if task not in measured]
            if missing:
                message = f"{self.params.balance} measures every task on data.validation; {missing[0]} has none there"
                yield Problem(where, message)

    def begin_step(self, trainer: AdapterTrainer, batches: Sequence[Mapping[str, Any]]) -> None:
        """Count samples and tokens of every task in the step, and measure the tasks where weights depend on it."""
        counts = trainer.summed(_counts(batches, len(self.given)))
        self.samples, self.tokens = counts
        self.divisors = counts
        if self.params.over == "data":
            if not len(self.all):
                rows: Any = trainer.train_dataset
                self.all = _counts([trainer.data_collator([row]) for row in rows], len(self.given)).to(counts)
            self.divisors = self.all * counts.sum(dim=1, keepdim=True) / self.all.sum(dim=1, keepdim=True)
        if self.params.balance in _MEASURED and trainer.state.global_step % self.params.every == 0:
            self._measure(trainer)

    def loss(
        self,
        trainer: AdapterTrainer,
        model: nn.Module,
        inputs: dict[str, Any],
        proceed: Callable[[dict[str, Any]], Tensor],
    ) -> Tensor:
        """Return the micro-batch's part of the balanced loss."""
        losses = trainer.token_losses(model, inputs)
        total = losses.new_zeros(())
        weights = self.task_weights(trainer.state.global_step).to(losses)
        for row, mask, task in zip(losses, _documents(inputs), inputs["task_ids"], strict=True):
            mask = mask.to(row)
            trained = mask.sum(dim=1)
            means = (mask @ row)[trained > 0] / trained[trained > 0]
            if self.params.balance in ("tokens", "samples"):
                by_tokens = self.params.balance == "tokens"
                total = total + (row.sum() / self.tokens.sum() if by_tokens else means.sum() / self.samples.sum())
            elif self.params.balance in ("task_samples", "focal"):
                sure = (mask @ (torch.exp(-row)))[trained > 0] / trained[trained > 0]
                hard = (1 - sure) ** self.params.gamma if self.params.balance == "focal" else 1.0
                total = total + weights[task] * (hard * means).sum() / self.divisors[0, task]
            else:
                total = total + weights[task] * row.sum() / self.divisors[1, task]
        return total

    def task_weights(self, step: int) -> Tensor:
        """Return the weights of the tasks in a step, 0 for those that have no part in its mean; their sum is 1."""
        weights = torch.tensor(self.given)
        if self.params.balance in _MEASURED and step >= self.params.warmup_steps and len(self.losses) >= 2:
            score = relative if self.params.balance == "convergence" else partial_coba(self.params.temperature)
            weights = weights * torch.from_numpy(score(slopes(np.array(self.losses), self.params.history))).float()
        weights = weights * (self.divisors[0].cpu() > 0)
        return weights / weights.sum()

    def _measure(self, trainer: AdapterTrainer) -> None:
        """Add the loss of every task on its next validation rows, over that of the first measurement."""
        rows: Any = trainer.eval_dataset
        model = trainer.unwrapped()
        found = []
        number = trainer.state.global_step // self.params.every
        with torch.no_grad(), evaluating(model), trainer.compute_loss_context_manager():
            for task in range(len(self.given)):
                own = [row for row in rows if row.task == task]
                chosen = [
                    own[(number * self.params.rows + i) % len(own)] for i in range(min(self.params.rows, len(own)))
                ]
                batch = trainer._prepare_inputs(trainer.data_collator(chosen))
                count = (batch["labels"][:, 1:] != IGNORED).sum()
                found.append(float(trainer.token_losses(model, batch).sum() / count))
        self.first = self.first or found
        self.losses.append([value / start for value, start in zip(found, self.first, strict=True)])

    def state(self) -> dict[str, Any]:
        """Return all measurements."""
        return {"losses": self.losses, "first": self.first}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from these measurements."""
        self.losses, self.first = state["losses"], state["first"]


def _counts(batches: Sequence[Mapping[str, Any]], num_tasks: int) -> Tensor:
    """Return the samples and the trained tokens of every task, `[2, tasks]`; whole numbers to 2^53."""
    counts = torch.zeros(2, num_tasks, dtype=torch.float64)
    for batch in batches:
        for mask, task in zip(_documents(batch), batch["task_ids"], strict=True):
            trained = mask.sum(dim=1)
            counts[:, task] += torch.stack([(trained > 0).sum(), trained.sum()]).cpu()
    return counts


def _documents(batch: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield of every row which of its predicted tokens are trained, by document, `[documents, T - 1]`.

    A row of several documents starts its positions anew in each.
    """
    labels, positions = batch["labels"], batch.get("position_ids")
    for index, row in enumerate(labels):
        trained = row[1:] != IGNORED
        if positions is None:
            yield trained[None]
            continue
        document = (positions[index] == 0).cumsum(0)[1:] - 1
        yield trained & (document == torch.arange(int(document.max()) + 1, device=row.device)[:, None])


def slopes(losses: np.ndarray, history: int) -> np.ndarray:
    """Return the slope of the line through the last losses of each task, after every measurement from the second on.

    Args:
        losses: `[measurements, tasks]`.
        history: measurements that a line goes through.

    Returns:
        `[measurements - 1, tasks]`, per measurement.
    """
    found = []
    for last in range(2, len(losses) + 1):
        part = losses[max(last - history, 0) : last]
        found.append(np.polyfit(np.arange(len(part)), part, 1)[0])
    return np.array(found)


def relative(slope: np.ndarray) -> np.ndarray:
    """Return the relative convergence score: more weight to a task the slower its loss falls beside the others'.

    Args:
        slope: `[measurements, tasks]`, of which the last counts.
    """
    last = slope[-1]
    return _softmax(len(last) * last / _positive(np.abs(last).sum()))


def absolute(slope: np.ndarray) -> np.ndarray:
    """Return the absolute convergence score: less weight to a task the slower its loss falls beside its own past."""
    return _softmax(-len(slope) * slope[-1] / _positive(np.abs(slope).sum(axis=0)))


def partial_coba(temperature: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return CoBa's score: the relative one while all tasks converge, the absolute one once one of them diverges."""

    def score(slope: np.ndarray) -> np.ndarray:
        worst = slope.max(axis=1)
        total = worst.sum()
        exponents = temperature * worst / (total if total else 1.0)
        share = min(len(worst) * _softmax(exponents)[-1], 1.0)
        return share * relative(slope) + (1 - share) * absolute(slope)

    return score


def _softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def _positive(values: np.ndarray) -> np.ndarray:
    return np.maximum(values, np.finfo(np.float64).tiny)
