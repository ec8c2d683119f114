"""Adapters of all other types: as LoRA where they are one, merged where they merge, else in a model of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import override

from toolkit.errors import UnsupportedError
from toolkit.kernels.grouped_lora import Pair
from toolkit.serving.adapters.contents import Contents, Source
from toolkit.serving.adapters.folders import check_unchanged
from toolkit.serving.adapters.peft_kinds import MergeableSource, PeftSource
from toolkit.serving.adapters.target import Target
from toolkit.serving.own_pass import OwnPass, is_paged


def open_other(folder: Path, task: str | None, target: Target, config: Mapping[str, Any]) -> Source:
    """Open an adapter in the best way in which it can be served.

    Args:
        folder: of an adapter of any type without a way of its own.
        task: of an adapter of several.
        target: the served model.
        config: of the adapter.

    Raises:
        UnsupportedError: there is none, with the reason.
    """
    if task is None and (found := _folded(folder, target, config)) is not None:
        return found
    if task is None:
        try:
            return MergeableSource(folder, target, config)
        except UnsupportedError as error:
            merging = error
            try:
                return OwnPassSource(folder, None, target, config)
            except UnsupportedError as other:
                raise UnsupportedError(f"{merging}; nor can it run in a pass of its own ({other})") from None
    return OwnPassSource(folder, task, target, config)


def _folded(folder: Path, target: Target, config: Mapping[str, Any]) -> FoldedSource | None:
    """Return an adapter of one of our methods as LoRA, or `None` where it is none, or more."""
    if config.get("modules_to_save"):
        return None
    try:
        return FoldedSource(folder, target, config)
    except UnsupportedError:
        return None


class FoldedSource(PeftSource):
    """An adapter of one of the toolkit's methods that is exactly a LoRA on linears.

    Raises:
        UnsupportedError: it is not.
    """

    def __init__(self, folder: Path, target: Target, config: Mapping[str, Any]) -> None:
        super().__init__(folder, target, config)
        pairs = self._pairs()
        if not pairs:
            raise UnsupportedError(f"{self.source}: not written as pairs of factors")
        self.ranks = {name: len(pair.a_rK) for name, pair in pairs.items()}
        self.nbytes = sum(rank * sum(target.widths(name, self.source)) for name, rank in self.ranks.items())
        self.nbytes *= target.model.dtype.itemsize
        self.description = f"{config['peft_type']} as LoRA, {len(pairs)} modules"

    @override
    def _read(self) -> Contents:
        return Contents(self._pairs())

    def _pairs(self) -> dict[str, Pair]:
        from toolkit.adapters.attached import attached  # imports PEFT
        from toolkit.adapters.fold import low_rank_pairs

        dtype = self.target.model.dtype
        found = low_rank_pairs(attached(self.target.model, self.folder))
        return {
            name: Pair(pair.a.detach().to(dtype).contiguous(), pair.b.detach().to(dtype).contiguous(), scale=pair.scale)
            for name, pair in found.items()
        }


class OwnPassSource(PeftSource):
    """An adapter whose requests run in a model of its own; it cannot be weighted or combined.

    Raises:
        UnsupportedError: they cannot.
    """

    is_exclusive = True

    def __init__(self, folder: Path, task: str | None, target: Target, config: Mapping[str, Any]) -> None:
        super().__init__(folder, target, config)
        self.task, self._content = task, self.key
        try:
            self.is_apart = not is_paged(self._attached(), target.observed.heads)
        except UnsupportedError as error:
            raise UnsupportedError(f"{self.source}: an adapter of type {config['peft_type']} ({error})") from None
        if task is not None:
            self.key = hashlib.blake2b(f"{self._content} {task}".encode(), digest_size=16).hexdigest()
        of_task = "" if task is None else f"task {task} of "
        how = "one request after another, with caches of their own" if self.is_apart else "in a pass of its own"
        self.description = f"{of_task}{config['peft_type']}, {how}"

    def _attached(self) -> Any:
        from toolkit.adapters.attached import attached  # imports PEFT

        return attached(self.target.model, self.folder, self.task)

    @override
    def read(self) -> Contents:
        check_unchanged(self.folder, self._content, self.source)
        return self._read()

    @override
    def _read(self) -> Contents:
        return Contents(own_pass=OwnPass(self._attached(), not self.is_apart, self.nbytes))
