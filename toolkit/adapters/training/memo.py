"""MEMO (2407.12117): activations on the host for some tokens, computed again for the others.

Of every decoder layer its input and the output of attention, which is dear to compute again, go to host memory or to a
disk while the next layers compute, and come back for the backward pass. Of all its other activations the same share of
tokens goes with them; the rest is computed again from the input, token by token, without attention. The share is the
largest for which moving a layer's activations takes no longer than computing the layer, and all of them together no
more than the host has: the answer to a linear programme with one unknown.

The paper's planner of memory addresses is not here: torch's allocator and the host's own are used as they are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from toolkit.adapters import processes
from toolkit.adapters.spec import TrainSpec
from toolkit.adapters.training._activations import Host, LayerPass
from toolkit.adapters.training._base import TrainingMethod
from toolkit.adapters.training._layers import decoder_layers, run_by
from toolkit.adapters.training.streambp import METHODS
from toolkit.errors import Problem, UnsupportedError
from toolkit.specs import Folder, Size

if TYPE_CHECKING:
    from toolkit.adapters.loop import AdapterTrainer

_OTHERS = ("streambp", "lightseq", "zero_infinity", "activation_density")
"""Methods that run layers in a way of their own, or look into them while they compute."""


class Memo(TrainingMethod):
    """Activations on the host, token by token."""

    class Params(TrainingMethod.Params):
        """Parameters.

        Attributes:
            fraction: of the tokens whose activations go to the host; by default measured in the first pass, which keeps
                none.
            host_memory: that activations may take there; the fraction is made smaller for batches that need more.
            tier: where they go: `cpu` is host memory, which helps where the device is another.
            folder: of the files of the tier `disk`, which are gone at the end; by default the system's for such files.
        """

        fraction: Annotated[float, Field(ge=0, le=1)] | None = None
        host_memory: Size | None = None
        tier: Literal["cpu", "disk"] = "cpu"
        folder: Folder | None = None

    params: Params

    def __init__(self, params: Params, spec: TrainSpec) -> None:
        super().__init__(params, spec)
        self.offload: Offload | None = None
        self.restored: dict[str, Any] | None = None

    def faults(self) -> Iterator[Problem]:
        """Refuse what does not work token by token, or keeps activations in another way."""
        if self.spec.adapter.method not in METHODS:
            known = ", ".join(METHODS)
            yield Problem("adapter.method", f"memo goes with {known}, not with {self.spec.adapter.method}")
        if self.params.fraction is not None and self.params.host_memory is not None:
            yield Problem(f"{self.where}.host_memory", "limits a fraction that is measured; leave one of them out")
        if self.spec.training.gradient_checkpointing:
            yield Problem("training.gradient_checkpointing", "memo computes again what it needs; set it to false")
        for chosen in self.spec.training.methods:
            if chosen.method in _OTHERS:
                yield Problem(self.where, f"{chosen.method} needs layers that compute once; leave one of them out")
        if processes.world() > 1 or self.spec.training.fsdp or self.spec.training.deepspeed:
            yield Problem(self.where, "memo runs in one process")

    @contextmanager
    def around(self, trainer: AdapterTrainer) -> Iterator[None]:
        """Have the layers of the model keep their activations on the host."""
        with ExitStack() as stack:
            folder = None
            if self.params.tier == "disk":
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=self.params.folder)))
            given = {"fraction": self.params.fraction, "limit": self.params.host_memory, "folder": folder}
            self.offload = stack.enter_context(activations_elsewhere(trainer.unwrapped(), **given))
            if self.restored is not None:
                self.offload.go_on(self.restored)
            yield

    def begin_step(self, trainer: AdapterTrainer, batches: Sequence[Mapping[str, Any]]) -> None:
        """Choose the fraction once a pass was measured."""
        if self.offload is not None:
            self.offload.choose()

    def state(self) -> dict[str, Any]:
        """Return the fraction: rounding depends on it."""
        return self.offload.state() if self.offload is not None else {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take the fraction of the run so far."""
        self.restored = state
        if self.offload is not None:
            self.offload.go_on(state)

    def record(self) -> dict[str, Any]:
        """Return the fraction, and the most bytes that were on the host at once."""
        found = self.offload
        return {"memo": {"fraction": found.fraction, "host_bytes": found.host.most}} if found is not None else {}


@dataclass(frozen=True)
class Costs:
    """What a token costs in a decoder layer.

    Attributes:
        always: bytes that go to the host in any case.
        rest: bytes that go there or are computed again.
        seconds: of computing the layer.
    """

    always: float
    rest: float
    seconds: float


def best_fraction(
    costs: Costs, *, bandwidth: float, layers: int = 1, tokens: int = 1, limit: float | None = None
) -> float:
    """Return the largest fraction of tokens, in [0, 1], whose activations can go to the host.

    Moving a layer's takes no longer than computing the layer, `always + fraction rest <= seconds bandwidth`, and all
    layers' together no more than the host has, `layers tokens (always + fraction rest) <= limit`. Where not even
    `always` fits, it is 0.

    Args:
        costs: of a token.
        bandwidth: bytes per second to the host.
        layers: of the model.
        tokens: of the batch.
        limit: bytes of the host.
    """
    most = costs.seconds * bandwidth
    if limit is not None:
        most = min(most, limit / (layers * tokens))
    return min(max((most - costs.always) / costs.rest, 0.0), 1.0)


class Offload:
    """The passes of a model's layers, and the fraction of tokens that they keep.

    Args:
        host: that activations go to.
        layers: of the model.
        fraction: of tokens; `None` measures it.
        limit: bytes of the host.
    """

    def __init__(self, host: Host, layers: int, fraction: float | None, limit: float | None) -> None:
        self.host, self.layers, self.limit = host, layers, limit
        self.fraction = fraction
        self.costs: Costs | None = None
        self.measured: list[Costs] = []

    def run(self, forward: partial[Any], hidden: Tensor, *others: Any) -> Any:
        """Stand for the checkpointing function of a layer."""
        if not torch.is_grad_enabled():
            return forward(hidden, *others)
        if any(other is not None for other in others):
            raise UnsupportedError("memo: a layer of this model reads more than hidden states; leave memo out")
        call = partial(forward.func, *forward.args)
        layer = LayerPass(call, forward.keywords, hidden, self.kept(*hidden.shape[:2]), self.host)
        out = layer.forward(hidden)
        if self.fraction is None:
            tokens = hidden.shape[:2].numel()
            self.measured.append(Costs(layer.always / tokens, layer.rest / tokens, layer.seconds / tokens))
        return out

    def kept(self, rows: int, length: int) -> int:
        """Return the tokens of each row whose activations go to the host, for a batch of rows of a length."""
        fraction = self.fraction or 0.0
        if self.limit is not None and self.costs is not None:
            size = {"layers": self.layers, "tokens": rows * length, "limit": self.limit}
            fraction = min(fraction, best_fraction(self.costs, bandwidth=float("inf"), **size))
        return int(fraction * length)

    def choose(self) -> None:
        """Set the fraction by what was measured, if anything was."""
        if self.fraction is not None or not self.measured:
            return
        always, rest = (max(getattr(c, name) for c in self.measured) for name in ("always", "rest"))
        self.costs = Costs(always, rest, median(c.seconds for c in self.measured))
        bandwidth = self.host.moved / self.host.seconds if self.host.moved else float("inf")
        self.fraction = best_fraction(self.costs, bandwidth=bandwidth)

    def state(self) -> dict[str, Any]:
        """Return what `go_on` reads."""
        return {"fraction": self.fraction, "costs": list(vars(self.costs).values()) if self.costs else None}

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Take the fraction of a run so far."""
        if state.get("fraction") is not None:
            self.fraction = state["fraction"]
            self.costs = Costs(*state["costs"]) if state["costs"] else None


@contextmanager
def activations_elsewhere(
    model: Any, *, fraction: float | None = None, limit: float | None = None, folder: Path | None = None
) -> Iterator[Offload]:
    """Keep activations of a model's layers on the host, in training mode; they are as they were after the block.

    Args:
        model: a causal language model, or PEFT's around it.
        fraction: of the tokens; `None` measures it in the first pass.
        limit: bytes of the host.
        folder: of their files; `None` keeps them in host memory.

    Raises:
        UnsupportedError: its attention is not torch's.
    """
    layers = decoder_layers(model)
    if not layers or model.config.get_text_config()._attn_implementation != "sdpa":
        raise UnsupportedError("memo needs a decoder of transformers with sdpa attention; leave it out")
    host = Host(folder)
    offload = Offload(host, len(layers), fraction, limit)
    try:
        with run_by(layers, [offload.run] * len(layers)):
            yield offload
    finally:
        host.close()
