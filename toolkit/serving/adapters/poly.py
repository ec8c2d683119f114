"""One task of a POLY adapter (Poly, MHR): the LoRA that its routing makes of the skills."""

from __future__ import annotations

import hashlib
from pathlib import Path

from typing_extensions import override

from toolkit.errors import CheckpointError
from toolkit.kernels.grouped_lora import Pair
from toolkit.routing.token.mhr import Task, parse_task, read_skills
from toolkit.serving.adapters.contents import Contents, Source
from toolkit.serving.adapters.folders import check_unchanged, folder_hash
from toolkit.serving.adapters.target import Target


class PolySource(Source):
    """A task of a folder, `FOLDER#TASK`; requests of several tasks go into one batch as several adapters.

    Raises:
        MissingError: no such task.
        CheckpointError: it was made for another base.
    """

    def __init__(self, folder: Path, task: str | None, target: Target) -> None:
        self.folder, self.source, self.target = folder, str(folder), target
        skills = read_skills(folder)
        self.task: Task = parse_task(task, skills, self.source)
        self.content = folder_hash(folder)
        self.key = hashlib.blake2b(f"{self.content} {self.task}".encode(), digest_size=16).hexdigest()
        for name, own in skills.items():
            heads, _, inputs, _ = own.a.shape
            given, wanted = (heads * inputs, heads * own.b.shape[3]), target.widths(name, self.source)
            if given != wanted:
                raise CheckpointError(f"{self.source}: adapts {name} as {given}, in the served model it is {wanted}")
        self.ranks = {name: own.a.shape[3] for name, own in skills.items()}
        widths = {name: sum(target.widths(name, self.source)) for name in skills}
        self.nbytes = sum(rank * widths[name] for name, rank in self.ranks.items()) * target.model.dtype.itemsize
        self.description = f"task {self.task} of POLY, {len(self.ranks)} modules"

    @override
    def read(self) -> Contents:
        check_unchanged(self.folder, self.content, self.source)
        dtype, found = self.target.model.dtype, {}
        for name, own in read_skills(self.folder).items():
            pair = own.pair(self.task)
            found[name] = Pair(pair.a_rK.to(dtype), pair.b_Nr.to(dtype), scale=pair.scale)
        return Contents(found)
