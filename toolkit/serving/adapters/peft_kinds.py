"""PEFT folders that are no LoRA: IA3, prefix and prompt tuning, and whatever PEFT can merge into weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from typing_extensions import override

from toolkit.checkpoints.adapters import WEIGHTS
from toolkit.errors import CheckpointError, UnsupportedError
from toolkit.serving.adapters.contents import Contents, Prefix, Source
from toolkit.serving.adapters.folders import by_module, check_unchanged, folder_hash
from toolkit.serving.adapters.target import Target
from toolkit.serving.changes import Replaced, Scaled

_PREFIX = "base_model.model."


class PeftSource(Source):
    """What all kinds have in common."""

    def __init__(self, folder: Path, target: Target, config: Mapping[str, Any]) -> None:
        self.folder, self.source, self.target, self.config = folder, str(folder), target, config
        self.key, self.base = folder_hash(folder), config.get("base_model_name_or_path")
        self.nbytes = (folder / WEIGHTS).stat().st_size
        self.description = str(config["peft_type"])

    @override
    def read(self) -> Contents:
        check_unchanged(self.folder, self.key, self.source)
        return self._read()

    @abstractmethod
    def _read(self) -> Contents:
        """Read the contents."""

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name.removeprefix(_PREFIX): value for name, value in load_file(self.folder / WEIGHTS).items()}


class Ia3Source(PeftSource):
    """A factor per feature (IA3).

    Raises:
        CheckpointError: it was made for another base.
    """

    def __init__(self, folder: Path, target: Target, config: Mapping[str, Any]) -> None:
        super().__init__(folder, target, config)
        self._found = {
            name.removesuffix(".ia3_l"): value.reshape(-1)
            for name, value in self._tensors().items()
            if name.endswith(".ia3_l")
        }
        for name, factors in self._found.items():
            wanted = target.widths(name, self.source)[not self._of_inputs(name)]
            if len(factors) != wanted:
                raise CheckpointError(
                    f"{self.source}: scales {name} by {len(factors)} factors, but in the served model it has {wanted}"
                )
        self.description = f"IA3, {len(self._found)} modules"

    def _of_inputs(self, name: str) -> bool:
        known = self.config.get("feedforward_modules") or []
        return any(name == end or name.endswith(f".{end}") for end in known)

    @override
    def _read(self) -> Contents:
        dtype = self.target.model.dtype
        return Contents(changes={n: Scaled(v.to(dtype), self._of_inputs(n)) for n, v in self._found.items()})


class PrefixSource(PeftSource):
    """Keys and values before the prompt (prefix tuning); it cannot be weighted or combined.

    Raises:
        CheckpointError: it was made for another base.
    """

    is_exclusive = True

    def __init__(self, folder: Path, target: Target, config: Mapping[str, Any]) -> None:
        super().__init__(folder, target, config)
        heads = target.observed.heads
        stored = load_file(folder / WEIGHTS)["prompt_embeddings"]
        self.num_virtual = len(stored)
        if len(set(heads.values())) != 1 or stored.shape[1] != sum(2 * g * d for g, d in heads.values()):
            raise CheckpointError(
                f"{self.source}: {stored.shape[1]} numbers per token do not fit the {len(heads)} layers of the model"
            )
        self.description = f"prefix of {self.num_virtual} tokens"

    @override
    def _read(self) -> Contents:
        heads = self.target.observed.heads
        stored = load_file(self.folder / WEIGHTS)["prompt_embeddings"].to(self.target.model.dtype)
        groups, size = next(iter(heads.values()))
        both = stored.view(len(stored), len(heads), 2, groups, size).permute(2, 1, 0, 3, 4).contiguous()
        return Contents(prefix=Prefix(both[0], both[1]))


class PromptSource(PeftSource):
    """Embeddings before the prompt (prompt tuning, P-tuning), as the keys and values that the base makes of them.

    Like a prefix it cannot be weighted or combined.

    Raises:
        CheckpointError: it was made for another base.
        UnsupportedError: layers of the base differ in their heads.
    """

    is_exclusive = True

    def __init__(self, folder: Path, target: Target, config: Mapping[str, Any]) -> None:
        super().__init__(folder, target, config)
        embeddings = self._embeddings()
        self.num_virtual = len(embeddings)
        wanted = cast(torch.Tensor, target.model.get_input_embeddings().weight).shape[1]
        if embeddings.shape[1] != wanted:
            raise CheckpointError(
                f"{self.source}: its embeddings are {embeddings.shape[1]} wide, those of the served model {wanted}"
            )
        if len(set(target.observed.heads.values())) != 1:
            raise UnsupportedError(f"{self.source}: layers of the served model have different heads")
        self.description = f"{config['peft_type']}, {self.num_virtual} tokens before the prompt"

    def _embeddings(self) -> torch.Tensor:
        return load_file(self.folder / WEIGHTS)["prompt_embeddings"]

    @override
    def _read(self) -> Contents:
        from transformers import DynamicCache

        from toolkit.adapters.attached import beside  # imports PEFT

        model = beside(self.target.model)  # the engine may be in the middle of a step of its own
        embeddings = self._embeddings().to(model.device, model.dtype)
        with torch.inference_mode():
            layers = model(inputs_embeds=embeddings[None], past_key_values=DynamicCache(), use_cache=True)
        cached = [layers.past_key_values.layers[layer] for layer in self.target.observed.heads]
        keys, values = (torch.stack([getattr(c, n)[0].transpose(0, 1) for c in cached]) for n in ("keys", "values"))
        return Contents(prefix=Prefix(keys.contiguous(), values.contiguous()))


class MergeableSource(PeftSource):
    """Any other method of PEFT's, or of ours, that can be merged into weights: the changed weights are kept whole.

    Raises:
        UnsupportedError: it cannot be merged; opening tries, since nothing else tells.
    """

    def __init__(self, folder: Path, target: Target, config: Mapping[str, Any]) -> None:
        super().__init__(folder, target, config)
        contents = self._read()
        self.nbytes = contents.nbytes
        self.description = f"{config['peft_type']}, {len(contents.changes)} modules merged"

    @override
    def _read(self) -> Contents:
        from toolkit.adapters.merged import merged_parameters  # imports PEFT

        kind = self.config["peft_type"]
        try:
            found = merged_parameters(self.target.model, self.folder)
        except UnsupportedError as error:
            raise UnsupportedError(f"{error}: an adapter of type {kind} that cannot be served") from None
        values = {name: value for name, value in found.items() if name in self.target.parameters}
        changed = by_module(values, self.target, self.source)
        if not changed:
            raise UnsupportedError(
                f"{self.source}: an adapter of type {kind}; merging it changes no weight, so it cannot be served"
            )
        return Contents(changes={module: Replaced(parameters) for module, parameters in changed.items()})
