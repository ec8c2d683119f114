"""ZeRO-Infinity's tiers on one machine (2104.07857): a frozen base in host memory or on a disk.

A decoder layer's frozen weights come when it computes and go when the next ones did, so that a few layers are on the
device at once. Activations are computed again in
the backward pass, so that they come once more then. The order of the layers is learned in the first step, and from the
second the next layer is read while one computes. The head's weight, which is often the largest, may come in tiles of a
few rows, which rounds otherwise. In all else the result is that of gradient checkpointing in memory, to the bit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from torch import nn
from torch.utils.checkpoint import checkpoint

from toolkit.adapters import processes
from toolkit.adapters.catalogue import FULL
from toolkit.adapters.spec import TrainSpec
from toolkit.adapters.training._base import TrainingMethod
from toolkit.adapters.training._layers import decoder_layers, run_by
from toolkit.adapters.training._offload import Store, TiledLinear, Window
from toolkit.errors import Problem, UnsupportedError
from toolkit.specs import Folder

if TYPE_CHECKING:
    from toolkit.adapters.loop import AdapterTrainer


class ZeroInfinity(TrainingMethod):
    """A base that is elsewhere."""

    class Params(TrainingMethod.Params):
        """Parameters.

        Attributes:
            tier: where the frozen weights are: `cpu` is host memory, which helps where the device is another.
            folder: of the files of the tier `disk`, which are gone at the end; by default the system's for such files.
            window: layers on the device at once, one of them read ahead.
            tile: rows of the head's weight on the device at once, where it is frozen and not the embeddings'.
        """

        tier: Literal["cpu", "disk"] = "cpu"
        folder: Folder | None = None
        window: Annotated[int, Field(ge=2)] = 2
        tile: Annotated[int, Field(ge=1)] | None = None

    params: Params

    def __init__(self, params: Params, spec: TrainSpec) -> None:
        super().__init__(params, spec)
        self.window: Window | None = None

    def faults(self) -> Iterator[Problem]:
        """Refuse what has no frozen base, or computes activations again in another way."""
        if self.spec.adapter.method == FULL:
            yield Problem("adapter.method", "zero_infinity keeps a frozen base elsewhere; expected an adapter")
        if self.spec.quantization:
            yield Problem("quantization", "zero_infinity moves plain weights; leave one of them out")
        if self.spec.training.gradient_checkpointing:
            yield Problem("training.gradient_checkpointing", "zero_infinity does so itself; set it to false")
        for chosen in self.spec.training.methods:
            if chosen.method in ("streambp", "lightseq"):
                yield Problem(self.where, f"{chosen.method} runs layers in a way of its own; leave one of them out")
        if processes.world() > 1 or self.spec.training.fsdp or self.spec.training.deepspeed:
            yield Problem(self.where, "zero_infinity runs in one process")

    @contextmanager
    def around(self, trainer: AdapterTrainer) -> Iterator[None]:
        """Take the frozen weights away; they are back at the end."""
        with ExitStack() as stack:
            folder = None
            if self.params.tier == "disk":
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=self.params.folder)))
            model = trainer.unwrapped()
            self.window = stack.enter_context(offloaded(model, folder, self.params.window, self.params.tile))
            yield

    def begin_step(self, trainer: AdapterTrainer, batches: Sequence[Mapping[str, Any]]) -> None:
        """Expect the order of the step before."""
        if self.window is not None:
            self.window.begin()


@contextmanager
def offloaded(model: Any, folder: Path | None, size: int, tile: int | None = None) -> Iterator[Window]:
    """Keep the frozen weights of a model's decoder layers elsewhere; they are back after the block.

    Args:
        model: a causal language model, or PEFT's around it.
        folder: of their files; `None` keeps them in host memory.
        size: layers on the device at once.
        tile: rows of the head's weight on the device at once.

    Raises:
        UnsupportedError: there are no layers of transformers.
    """
    layers = decoder_layers(model)
    if not layers:
        raise UnsupportedError("zero_infinity needs a decoder of transformers; leave it out")
    store, parts = Store(folder), [[p for p in layer.parameters() if not p.requires_grad] for layer in layers]
    for part in parts:
        store.take(part)
    window = Window(store, parts, size)
    handles = [
        layer.register_forward_pre_hook(lambda *_, index=index: window.enter(index))  # without gradients, too
        for index, layer in enumerate(layers)
    ]
    try:
        with run_by(layers, [partial(_run, window, index) for index in range(len(layers))]), _tiled(model, store, tile):
            yield window
    finally:
        for handle in handles:
            handle.remove()
        window.close()
        store.give_back()


def _run(window: Window, index: int, forward: Any, *args: Any) -> Any:
    """Stand for the checkpointing function of a layer: its weights are there whenever it computes."""

    def present(*given: Any) -> Any:
        window.enter(index)
        return forward(*given)

    return checkpoint(present, *args, use_reentrant=False)


@contextmanager
def _tiled(model: Any, store: Store, tile: int | None) -> Iterator[None]:
    embeddings = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    frozen = isinstance(head, nn.Linear) and head.bias is None and not head.weight.requires_grad
    if tile is None or not frozen or head.weight is embeddings.weight:
        yield
        return
    weight: Any = head.weight
    count = head.out_features
    store.take([weight])
    vars(head)["forward"] = lambda x: TiledLinear.apply(x, partial(store.rows, weight), count, tile)
    try:
        yield
    finally:
        del vars(head)["forward"]
