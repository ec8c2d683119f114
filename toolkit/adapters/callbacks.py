"""What happens during training besides training: metrics to files, progress to the terminal, more checkpoints."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from math import inf
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from toolkit.adapters.runs import step_of
from toolkit.checkpoints.writer import write_text
from toolkit.progress import Progress, track
from toolkit.tables import human_bytes, human_count

_LAST = 20
"""Steps by which the speed is told."""


def tensorboard(folder: Path) -> TensorBoardCallback:
    """Return the callback that writes TensorBoard's event files."""
    from tensorboardX import SummaryWriter

    return TensorBoardCallback(SummaryWriter(str(folder)))


class MetricsFile(TrainerCallback):
    """Appends every logged entry to a JSONL file.

    Args:
        path: of the file.
        checkpoint: that training goes on from; entries after its step are dropped, since they come again, and so is
            one that a kill cut off.
    """

    def __init__(self, path: Path, checkpoint: Path | None) -> None:
        self.path = path
        last = step_of(checkpoint) if checkpoint else 0
        lines = path.read_text(encoding="utf-8").splitlines() if checkpoint and path.is_file() else []
        kept = [line for line in lines if _step(line) <= last]
        write_text(path, "".join(line + "\n" for line in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one entry."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


def _step(line: str) -> float:
    """Return the step of an entry; one that is cut off is after every step."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return inf


class Rhythm(TrainerCallback):
    """Adds checkpoints and log entries to those that the trainer makes by itself.

    A checkpoint does not hold the losses since the last entry. With an entry beside every checkpoint there are none,
    and a resumed run logs what an undisturbed one does.

    Args:
        save_steps: steps between two checkpoints, which early stopping would otherwise set by its evaluations alone.
    """

    def __init__(self, save_steps: int | None) -> None:
        self.save_steps = save_steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Decide after a step."""
        if self.save_steps and state.global_step % self.save_steps == 0:
            control.should_save = True
        self._log(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Decide after an epoch."""
        self._log(control)

    def _log(self, control: TrainerControl) -> None:
        if control.should_save or control.should_evaluate or control.should_training_stop:
            control.should_log = True


class Allocation(TrainerCallback):
    """Tells methods that drop ranks in the course of training (AdaLoRA, AdaMSS) of every step.

    Args:
        model: PEFT's, or any other, which is left alone.
        fit_schedule: end the schedule of ranks with the last step.
    """

    def __init__(self, model: Any, fit_schedule: bool) -> None:
        self.tuner: Any = getattr(model, "base_model", None)
        self.fit_schedule = fit_schedule

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the schedule's end."""
        if self.fit_schedule and hasattr(self.tuner, "rankallocator"):
            self.tuner.rankallocator.set_total_step(state.max_steps)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose ranks, by the gradients of the step that was just taken."""
        if hasattr(self.tuner, "update_and_allocate"):
            self.tuner.update_and_allocate(state.global_step)


class ShowProgress(TrainerCallback):
    """Shows steps, losses, tokens per second, memory, and the time that is left.

    Args:
        label: of the bar.
        quiet: show nothing.
    """

    def __init__(self, label: str, quiet: bool) -> None:
        self.label, self.quiet = label, quiet
        self.stack = ExitStack()
        self.progress: Progress | None = None
        self.losses: dict[str, float] = {}
        self.seen: deque[tuple[float, int, int]] = deque(maxlen=_LAST)
        self.tokens: Callable[[], int] = lambda: 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar."""
        shown = track(f"training {self.label}", state.max_steps, unit="steps", quiet=self.quiet)
        self.progress = self.stack.enter_context(shown)
        self.progress.advance(state.global_step)
        self.seen.append((time.monotonic(), state.global_step, self.tokens()))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count a step, and tell how fast the last ones were."""
        if self.progress:
            self.seen.append((time.monotonic(), state.global_step, self.tokens()))
            self.progress.note(self.line(state.max_steps))
            self.progress.advance()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the newest losses."""
        self.losses |= {key: value for key, value in (logs or {}).items() if key in ("loss", "eval_loss")}
        if self.progress:
            self.progress.note(self.line(state.max_steps))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the bar."""
        self.stack.close()
        self.progress = None

    def line(self, steps: int) -> str:
        """Return what stands beside the count, by the steps that were seen last."""
        shown = [f"{key} {float(value):.4f}" for key, value in self.losses.items()]
        (begin, first, before), (now, last, tokens) = self.seen[0], self.seen[-1]
        if last > first and now > begin:
            shown.append(f"{human_count((tokens - before) / (now - begin))} tokens/s")
        shown.append(human_bytes(peak_memory()))
        if last > first:
            shown.append(f"{human_seconds((now - begin) / (last - first) * (steps - last))} left")
        return "  ".join(shown)


def peak_memory() -> int:
    """Return the most bytes that were in use at once: of the GPU, or of this process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:  # Linux keeps the parent's in what `getrusage` says, where that was larger
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else used * 1024


def human_seconds(seconds: float) -> str:
    """Write a time for people: `2h05m`, `3m07s`, `12s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
