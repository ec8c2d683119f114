"""Train an adapter on a teacher's answers, or on its distributions where both read the same tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from toolkit.adapters.state import load_trained_state, trained_state
from toolkit.adapters.transfer.spec import DistillationSpec
from toolkit.data.collate import Collator
from toolkit.data.pack import alone
from toolkit.data.render import IGNORED, Example
from toolkit.data.tokenizer import Tokenizer
from toolkit.errors import SpecError
from toolkit.models.load import LoadedModel
from toolkit.progress import track

TRAINED, OPTIMIZER = "trained.pt", "optimizer.pt"


def loss_kind(
    spec: DistillationSpec, source: Tokenizer, target: Tokenizer, texts: Sequence[str]
) -> Literal["logits", "text"]:
    """Decide what the student learns from.

    Raises:
        SpecError: distributions are asked for, but tokens of the two models are not the same.
    """
    same = _vocabulary(source) == _vocabulary(target) and all(source.encode(t) == target.encode(t) for t in texts)
    if spec.loss == "logits" and not same:
        raise SpecError(
            "distillation.loss: the two models have different tokens, so logits cannot be compared; take text"
        )
    return "text" if spec.loss == "text" or not same else "logits"


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    return tokenizer.get_vocab()


def divergence(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over trained tokens of `KL(teacher || student)`.

    Args:
        student: logits `[B, T, N]`.
        teacher: likewise; entries past the smaller vocabulary are padding of the larger head.
        labels: `[B, T]`, -100 where a token is not trained.
    """
    kept = labels[:, 1:] != IGNORED
    count = min(student.shape[-1], teacher.shape[-1])
    ours, theirs = (logits[:, :-1][kept][:, :count].float() for logits in (student, teacher))
    found: Any = _Divergence.apply(ours, theirs)
    return found


class _Divergence(torch.autograd.Function):
    """Its gradient is exactly zero where both are equal, which a sum of logarithms' is not; an optimizer scales up."""

    @staticmethod
    def forward(ctx: Any, ours: Tensor, theirs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, p = ours.log_softmax(-1), theirs.log_softmax(-1)
        ctx.save_for_backward(q.exp() - p.exp())
        return functional.kl_div(q, p, log_target=True, reduction="batchmean")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (difference,) = ctx.saved_tensors
        return grad * difference / max(len(difference), 1), None


def likelihood_loss(student: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of the trained tokens."""
    return functional.cross_entropy(
        student[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED
    )


def distil(
    student: LoadedModel,
    teacher: LoadedModel | None,
    examples: Sequence[Example],
    spec: DistillationSpec,
    folder: Path,
    *,
    quiet: bool = False,
) -> list[float]:
    """Train the student; go on from what lies in the folder.

    Args:
        student: with a new adapter.
        teacher: whose distributions are learned; `None` where the rows' answers are.
        examples: of the student's tokens, which are the teacher's as well if there is one.
        spec: how.
        folder: of checkpoints.
        quiet: show no progress.

    Returns:
        The loss of every step that was taken now.
    """
    model: Any = student.model
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=spec.learning_rate, weight_decay=0.0)
    first = _resumed(model, optimizer, folder)
    collate, losses = Collator(student.tokenizer.pad_token_id or 0), []
    model.train()
    with track("distilling", spec.max_steps, unit="steps", quiet=quiet) as progress:
        progress.advance(first)
        for step in range(first, spec.max_steps):
            batch = collate([alone(examples[i]) for i in chosen(len(examples), spec, step)])
            batch = {name: value.to(model.device) for name, value in batch.items()}
            for group in optimizer.param_groups:
                group["lr"] = spec.learning_rate * (1 - step / spec.max_steps)
            with torch.random.fork_rng():
                torch.manual_seed(spec.seed + step)  # dropout, the same after a stop
                losses.append(_step(model, teacher, batch, optimizer, trained, spec))
            progress.advance()
            progress.note(f"loss {losses[-1]:.3g}")
            if (step + 1) % spec.save_steps == 0:
                _save(model, optimizer, step + 1, folder)
    model.eval()
    return losses


def chosen(count: int, spec: DistillationSpec, step: int) -> list[int]:
    """Return the rows of a step: one random order after another."""
    rows: list[int] = []
    for place in range(step * spec.batch_size, (step + 1) * spec.batch_size):
        epoch, index = divmod(place, count)
        order = list(range(count))
        random.Random(f"{spec.seed}/{epoch}").shuffle(order)
        rows.append(order[index])
    return rows


def _step(
    model: Any,
    teacher: LoadedModel | None,
    batch: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    trained: Sequence[Tensor],
    spec: DistillationSpec,
) -> float:
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits
    if teacher is None:
        loss = likelihood_loss(logits, labels)
    else:
        with torch.no_grad():
            wanted = teacher.model(**batch, use_cache=False).logits
        loss = divergence(logits, wanted, labels)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, spec.max_grad_norm)
    optimizer.step()
    return float(loss.detach())


def _save(model: Any, optimizer: torch.optim.Optimizer, step: int, folder: Path) -> None:
    for name, state in ((TRAINED, trained_state(model)), (OPTIMIZER, {"step": step, "state": optimizer.state_dict()})):
        torch.save({"step": step, **state}, folder / f".{name}")
    for name in (TRAINED, OPTIMIZER):
        (folder / f".{name}").replace(folder / name)


def _resumed(model: Any, optimizer: torch.optim.Optimizer, folder: Path) -> int:
    """Read the last whole checkpoint; return the steps that were taken."""
    if not (folder / TRAINED).is_file() or not (folder / OPTIMIZER).is_file():
        return 0
    steps = [torch.load(folder / n, map_location="cpu", weights_only=True)["step"] for n in (TRAINED, OPTIMIZER)]
    if steps[0] != steps[1]:  # stopped between the two
        return 0
    load_trained_state(model, folder / TRAINED)
    optimizer.load_state_dict(torch.load(folder / OPTIMIZER, weights_only=True)["state"])
    return int(steps[0])
