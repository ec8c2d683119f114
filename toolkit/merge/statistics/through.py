"""Inner products of what enters linear layers after the layers below have been merged: a merge, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from toolkit.checkpoints.reader import FolderCheckpoint
from toolkit.data.render import Example
from toolkit.errors import UnsupportedError
from toolkit.merge.plan import Plan
from toolkit.merge.statistics.files import Part, Statistics, StatisticsWriter, weights_file
from toolkit.merge.statistics.gram import Grams, linears
from toolkit.merge.statistics.models import fill, runnable, tensor_names, tokens_of
from toolkit.merge.stream import Scratch, Stream
from toolkit.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a layer is called with besides the hidden states."""


def measure(
    plan: Plan, folder: Path, data: Sequence[Sequence[Example]], device: torch.device, progress: Progress
) -> None:
    """Measure all models and write their statistics.

    One model is in memory: it holds the merged layers below, and in the layer at hand one model after another.

    Args:
        plan: of the merge.
        folder: to write in.
        data: examples of each model.
        device: to run on.
        progress: advanced once per layer, model and example.

    Raises:
        UnsupportedError: an architecture without a stack of layers.
    """
    _LayerByLayer(plan, folder, data, runnable(plan.inputs.donor, device), progress).run()


def stack_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the layers of a decoder.

    Raises:
        UnsupportedError: there is no such stack.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UnsupportedError(f"{type(model).__name__}: has no stack of layers to merge one by one; use regmean")


class _LayerByLayer:
    def __init__(
        self,
        plan: Plan,
        folder: Path,
        data: Sequence[Sequence[Example]],
        model: PreTrainedModel,
        progress: Progress,
    ) -> None:
        self.plan, self.data, self.model, self.progress = plan, data, model, progress
        self.layers = stack_of(model)
        self.names = tensor_names(model, plan.inputs.donor)
        self.of_parameter = {p: self.names[n] for n, p in model.named_parameters() if n in self.names}
        self.jobs = {job.tensor.name: job for job in plan.jobs}
        self.modules = linears(model, self.names)
        self.parts = self._shared_parts()
        self.writers = [StatisticsWriter(folder, i, self.parts) for i in range(len(data))]
        self.files = [FolderCheckpoint(folder / weights_file(i)) for i in range(len(data))]
        self.scratch = Scratch()

    def _shared_parts(self) -> dict[str, Part]:
        """Let layers that see the same inputs share a part, as a run shows; those that it did not reach do not."""
        grams = Grams(self.modules)
        with torch.inference_mode(), grams.watching():
            self.model(input_ids=tokens_of(self.data[0][0], self.model.device), use_cache=False)
        return {part.stored: part for part in self.modules.values()} | grams.parts()

    def run(self) -> None:
        inside = {module for layer in self.layers for module in layer.modules()}
        outside = {module: part for module, part in self.modules.items() if module not in inside}
        parameters = {p for layer in self.layers for p in layer.parameters()}
        heads = {module.weight for module in outside}
        with torch.inference_mode():
            self._merge([p for p in self.of_parameter if p not in parameters and p not in heads])
            calls, states = self._calls()
            for index, layer in enumerate(self.layers):
                self._measure(layer, [c[index] for c in calls], states)
                self._merge(list(layer.parameters()))
                states = self._advance(layer, [c[index] for c in calls], states)
            if outside:
                self._measure_outside(outside)
        for writer in self.writers:
            writer.finish()
        for file in self.files:
            file.close()

    def _examples(self) -> Iterator[tuple[int, Example]]:
        for i, examples in enumerate(self.data):
            for example in examples:
                yield i, example

    def _calls(self) -> tuple[list[list[Call]], list[torch.Tensor]]:
        """Return, for each example, what every layer is called with, and the states that enter the first."""
        calls: list[list[Call]] = []
        states: list[torch.Tensor] = []

        def see(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            named = dict(named)
            first, rest = (given[0], given[1:]) if given else (named.pop("hidden_states"), ())
            if module is self.layers[0]:
                states.append(first)
            calls[-1].append((rest, named))

        handles = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in self.layers]
        try:
            for _, example in self._examples():
                calls.append([])
                self.model(input_ids=tokens_of(example, self.model.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return calls, states

    def _measure(self, layer: nn.Module, calls: Sequence[Call], states: Sequence[torch.Tensor]) -> None:
        """Run a layer with each model's weights on that model's data."""
        modules = {module: self.modules[module] for module in layer.modules() if module in self.modules}
        owners = [i for i, _ in self._examples()]
        for i, model in enumerate(self.plan.inputs.models):
            for parameter in layer.parameters():
                fill(parameter, model.weights, self.of_parameter[parameter])
            grams = Grams(modules)
            with grams.watching():
                for owner, (rest, named), state in zip(owners, calls, states, strict=True):
                    if owner == i:
                        layer(state, *rest, **named)
                        grams.tokens += state.shape[1]
                        self.progress.advance()
            self._write(i, grams, modules)

    def _write(self, index: int, grams: Grams, modules: Mapping[nn.Module, Part]) -> None:
        means = dict(grams.means())
        for name in dict.fromkeys(self.parts[part.stored].stored for part in modules.values()):
            width = self.parts[name].shape
            value = means.get(name)
            self.writers[index].write(name, (torch.zeros(width) if value is None else value).cpu().numpy())

    def _merge(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give parameters their merged values."""
        for parameter in parameters:
            job = self.jobs[self.of_parameter[parameter]]
            if job.action == "copy":
                fill(parameter, job.donor.checkpoint, job.donor.name)
                continue
            part = self.parts.get(job.tensor.name)
            known = Statistics(self.files, [part] * len(self.files)) if part else None
            stream = Stream(job, self.plan.method, self.scratch, statistics=known)
            flat = parameter.view(-1)
            for start, merged in stream.merged():
                flat[start : start + len(merged)] = torch.from_numpy(merged.copy()).to(flat.device)

    def _advance(self, layer: nn.Module, calls: Sequence[Call], states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return what leaves a layer."""
        found = []
        for (rest, named), state in zip(calls, states, strict=True):
            out = layer(state, *rest, **named)
            found.append(out[0] if isinstance(out, tuple) else out)
        return found

    def _measure_outside(self, outside: Mapping[nn.Module, Part]) -> None:
        """Measure layers outside of the stack, such as the head, in the model whose stack is merged."""
        for i, examples in enumerate(self.data):
            grams = Grams(outside)
            with grams.watching():
                for example in examples:
                    self.model(input_ids=tokens_of(example, self.model.device), use_cache=False)
                    grams.tokens += len(example.tokens)
            self._write(i, grams, outside)
