"""A merge that is split over machines: each writes a share of the output's files, and a join puts them together.

The files are those of the merge in one go, so what is joined is the same to the last byte. Every part notes what it was
made from: the spec, the layout, and hashes of samples of the inputs' files, wherever they lie on its machine.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit import specs
from toolkit.checkpoints.companions import versions
from toolkit.checkpoints.headers import TensorInfo
from toolkit.checkpoints.reader import INDEX, read_json
from toolkit.checkpoints.writer import check_free, index_of, staged, write_text
from toolkit.errors import MissingError, OutputError, Problem, SpecError
from toolkit.merge.plan import Plan, make_plan
from toolkit.merge.record import Companions, sampled_hash
from toolkit.merge.spec import MergeSpec
from toolkit.tables import human_bytes

if TYPE_CHECKING:
    from toolkit.merge.run import MergeResult

PART = "part.json"


@dataclass(frozen=True)
class Part:
    """One share of a merge.

    Attributes:
        index: from 1 on.
        count: shares that there are.
    """

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read `i/n`.

        Raises:
            SpecError: it is something else.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise SpecError(f"--shard {text!r}: expected i/n, such as 2/4 for the second of four shares")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        """Return `i/n`."""
        return f"{self.index}/{self.count}"

    def folder(self, out: Path) -> Path:
        """Return the folder of the share of an output."""
        return out.with_name(f"{out.name}.part-{self.index}-of-{self.count}")

    def shards(self, plan: Plan) -> dict[str, list[TensorInfo]]:
        """Return the output's files that are this share's: the largest first to whoever has the least.

        Raises:
            SpecError: there are fewer files than shares.
        """
        if plan.method.statistics:
            raise plan.spec.error([Problem("merge_method", f"{plan.method.name} measures whole models; no --shard")])
        sizes = {name: sum(tensor.nbytes for tensor in tensors) for name, tensors in plan.shards.items()}
        if len(sizes) < self.count:
            wanted = human_bytes(plan.write_bytes / (2 * self.count)).replace(" ", "")
            raise SpecError(f"--shard {self}: the output has {len(sizes)} files; pass --shard-size {wanted}, say")
        loads = [0] * self.count
        own: list[str] = []
        for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
            least = loads.index(min(loads))
            loads[least] += sizes[name]
            own += [name] if least == self.index - 1 else []
        return {name: tensors for name, tensors in plan.shards.items() if name in own}

    def note(self, plan: Plan, folder: Path, finite: Mapping[str, bool]) -> None:
        """Write what a finished share was made from, beside its files."""
        files = {name: sampled_hash(folder / name) for name in self.shards(plan)}
        note = {"part": str(self), "made_from": _made_from(plan), "files": files, "finite": dict(finite)}
        write_text(folder / PART, json.dumps(note, indent=2) + "\n")


def _made_from(plan: Plan) -> dict[str, Any]:
    """Return an identity of a merge that is the same on all machines."""
    return {
        "spec": plan.spec.model_dump(mode="json", by_alias=True, exclude_defaults=True),
        "inputs": sorted(f"{file.name} {file.stat().st_size} {sampled_hash(file)}" for file in plan.inputs.files()),
        "files": {name: [(t.name, t.dtype.name, list(t.shape)) for t in shard] for name, shard in plan.shards.items()},
        "device": plan.device or "cpu",
        "toolkit": versions()["composition-toolkit"],
    }


def join(
    spec: specs.Source | MergeSpec,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    overwrite: bool = False,
    beside: Companions | None = None,
    **planned: Any,
) -> MergeResult:
    """Put the shares of a merge together, which lie beside `out` as `OUT.part-i-of-n`, and remove them.

    Args:
        spec: that they were made by.
        out: folder to write.
        overrides: changes to the spec, as they were made for every share.
        smoke: apply the spec's own `smoke:` block.
        overwrite: replace `out` if it exists.
        beside: what is written beside the weights.
        planned: options of `make_plan`, as they were for every share.

    Raises:
        MissingError: a share is not there.
        OutputError: a share is of another merge, or was changed since; or `out` exists.
    """
    from toolkit.merge.run import finish, result_of

    out, started = Path(out), time.perf_counter()
    check_free(out, overwrite=overwrite)
    plan = make_plan(specs.load(spec, MergeSpec, overrides=overrides, smoke=smoke), **planned)
    try:
        folders = _find(out)
        notes = _checked(plan, folders)
        finite = {name: is_finite for note in notes for name, is_finite in note["finite"].items()}
        with staged(out, overwrite=overwrite) as partial:
            for folder, note in zip(folders, notes, strict=True):
                for name in note["files"]:
                    _link(folder / name, partial / name)
            if len(plan.shards) > 1:
                write_text(partial / INDEX, index_of(plan.shards))
            outputs, inputs = finish(plan, partial, beside or Companions(), finite)
    finally:
        plan.inputs.close()
    for folder in folders:
        shutil.rmtree(folder)
    return result_of(plan, out, outputs, inputs, time.perf_counter() - started)


def _find(out: Path) -> list[Path]:
    """Return the folders of all shares of an output, in order."""
    found: dict[int, dict[int, Path]] = {}
    for folder in out.parent.glob(f"{glob.escape(out.name)}.part-*-of-*"):
        name = re.fullmatch(r".*\.part-(\d+)-of-(\d+)", folder.name)
        if name and (folder / PART).is_file():
            found.setdefault(int(name[2]), {})[int(name[1])] = folder
    if not found:
        raise MissingError(f"{out}.part-1-of-N: no such folder; run toolkit merge SPEC {out} --shard i/N for every i")
    if len(found) > 1:
        counts = " and ".join(map(str, sorted(found)))
        raise OutputError(f"{out}: there are shares of {counts}; remove those that do not belong")
    ((count, parts),) = found.items()
    absent = [f"{i}/{count}" for i in range(1, count + 1) if i not in parts]
    if absent:
        raise MissingError(f"{out}: without its shares {', '.join(absent)}; run them, or wait until they are done")
    return [parts[i] for i in sorted(parts)]


def _checked(plan: Plan, folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Read the notes of all shares; every one is of this merge, and its files are as they were written."""
    wanted = json.loads(json.dumps(_made_from(plan)))
    notes: list[dict[str, Any]] = []
    for folder in folders:
        note: Any = read_json(folder / PART)
        different = [key for key, value in wanted.items() if note["made_from"].get(key) != value]
        if different:
            raise OutputError(f"{folder}: is of another merge ({', '.join(different)} differ); run that share anew")
        for name, digest in note["files"].items():
            if not (folder / name).is_file() or sampled_hash(folder / name) != digest:
                raise OutputError(f"{folder / name}: is not as it was written; copy it again, or run that share anew")
        notes.append(note)
    names = [name for note in notes for name in note["files"]]
    if sorted(names) != sorted(plan.shards):
        raise OutputError(f"{folders[0].parent}: the shares do not make up the files of the output once each")
    return notes


def _link(file: Path, place: Path) -> None:
    """Put a file at a second place, without copying it where the disk allows."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)
