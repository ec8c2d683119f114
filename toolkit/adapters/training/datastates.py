"""DataStates (2406.10707): checkpoints that are written while training goes on.

Tensors do not change between two optimizer steps. So they are copied to host memory in the background during the next
forward and backward pass, which the step after waits for, and written from the copy during the steps after that. The
files are those of an ordinary checkpoint, to the byte. A checkpoint gets its name when whole; there is one copy at
most, and a checkpoint that comes before the last one is written waits for it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from toolkit.adapters import processes, runs
from toolkit.adapters.spec import TrainSpec
from toolkit.adapters.training._base import TrainingMethod
from toolkit.errors import Problem

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from toolkit.adapters.loop import AdapterTrainer

_WRITERS = (
    "torch.save",
    "transformers.modeling_utils.safe_save_file",
    "peft.peft_model.safe_save_file",
    "toolkit.adapters.state.save_file",
)
"""What writes the tensors of a checkpoint; all else of it is small."""

UNDER_WAY = "saving"
"""Folder beside the checkpoints for the one that is being written."""


class Datastates(TrainingMethod):
    """Checkpoints in the background."""

    def __init__(self, params: Any, spec: TrainSpec) -> None:
        super().__init__(params, spec)
        self.copied: Future[Any] | None = None
        self.written: Future[Any] | None = None
        self.worker: ThreadPoolExecutor | None = None

    def faults(self) -> Iterator[Problem]:
        """Refuse what needs a checkpoint at once, or moves weights between steps."""
        t = self.spec.training
        if t.save_steps is None:
            yield Problem("training.save_steps", "required: datastates writes checkpoints in the background")
        if t.early_stopping_patience:
            yield Problem(
                "training.early_stopping_patience", "datastates has no best checkpoint; leave one of them out"
            )
        if any(chosen.method == "flat_mtl" for chosen in t.methods):
            yield Problem(self.where, "flat_mtl moves the weights while they are copied; leave one of them out")
        if processes.world() > 1 or t.fsdp or t.deepspeed:
            yield Problem(self.where, "datastates runs in one process")

    @contextmanager
    def around(self, trainer: AdapterTrainer) -> Iterator[None]:
        """Have the trainer's checkpoints copied and written by a thread; the last one is whole at the end."""
        place, ordinary = Path(str(trainer.args.output_dir)), trainer._save_checkpoint
        shutil.rmtree(place / UNDER_WAY, ignore_errors=True)

        def save(*args: Any) -> None:
            self.wait()
            with deferred() as writes:
                ordinary(*args)
            self._go_on(writes, place, trainer.args.save_total_limit or 0, trainer.args.device)

        with (
            ThreadPoolExecutor(1, "checkpoint") as self.worker,
            _replaced(trainer, "_get_output_dir", lambda trial: str(place / UNDER_WAY)),
            _replaced(trainer, "_save_checkpoint", save),
        ):
            yield
            self.wait()

    def _go_on(self, writes: list[Write], place: Path, limit: int, device: torch.device) -> None:
        assert self.worker is not None
        ready = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        self.copied = self.worker.submit(_copied, writes, ready)
        self.written = self.worker.submit(_written, self.copied, place, limit)

    def wait(self) -> None:
        """Wait until the last checkpoint is whole.

        Raises:
            OSError: it could not be written.
        """
        if self.written is not None:
            written, self.written = self.written, None
            written.result()
            self.copied = None

    def callbacks(self, trainer: AdapterTrainer) -> list[TrainerCallback]:
        """Let no optimizer step begin before its tensors are copied."""
        return [_Barrier(self)]


class _Barrier(TrainerCallback):
    def __init__(self, method: Datastates) -> None:
        self.method = method

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait for the copy."""
        if self.method.copied is not None:
            self.method.copied.result()


Write = tuple[Callable[..., Any], Any, Any, dict[str, Any]]
"""A writer, what it writes, where to, and its other arguments."""


@contextmanager
def deferred() -> Iterator[list[Write]]:
    """Note what writers of tensors are called with inside the block, instead of calling them."""
    writes: list[Write] = []
    with ExitStack() as stack:
        for name in _WRITERS:
            module, _, attribute = name.rpartition(".")
            owner = import_module(module)
            stack.enter_context(_replaced(owner, attribute, _noting(getattr(owner, attribute), writes)))
        yield writes


def _noting(writer: Callable[..., Any], writes: list[Write]) -> Callable[..., None]:
    def note(values: Any, path: Any, **options: Any) -> None:
        if isinstance(values, dict | list):
            writes.append((writer, _mapped(values, lambda tensor: tensor.detach()), path, options))
        else:
            writer(values, path, **options)

    return note


def _mapped(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return dicts and lists anew, with their tensors changed."""
    if isinstance(values, Tensor):
        return change(values)
    if isinstance(values, dict | list):
        values = copy(values)
        for key in values if isinstance(values, dict) else range(len(values)):
            values[key] = _mapped(values[key], change)
    return values


def _copied(writes: list[Write], ready: Any) -> list[Write]:
    """Copy all tensors to host memory, on a GPU once what they wait for is done."""
    with torch.cuda.stream(torch.cuda.Stream()) if ready is not None else nullcontext():
        if ready is not None:
            torch.cuda.current_stream().wait_event(ready)
        return [(w, _mapped(values, lambda t: t.to("cpu", copy=True)), *rest) for w, values, *rest in writes]  # pyright: ignore[reportReturnType]


def _written(copied: Future[list[Write]], place: Path, limit: int) -> None:
    """Write what was copied, give the checkpoint its name, and drop the oldest ones."""
    for writer, values, path, options in copied.result():
        writer(values, path, **options)
    (folder,) = (place / UNDER_WAY).iterdir()
    folder.rename(place / folder.name)
    (place / UNDER_WAY).rmdir()
    for old in runs.checkpoints(place.parent)[limit:] if limit else []:
        shutil.rmtree(old)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for the time of the block."""
    own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
