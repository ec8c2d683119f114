"""Merging on a GPU against the disk: `python -m benchmarks.merge --device cuda [--size 7B] [--methods NAME,...]`.

The aim is for element-wise methods to take at most 1.2 times what reading the inputs and writing the output takes. The
floor is measured beside each merge, on the same files: as many threads as a merge has read them in blocks of the same
size, and write as many bytes as the output has. Inputs are dropped from the page cache first, unless `--warm` is given.
The merge's time is its own `seconds`, without starting Python and importing torch.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import yaml

from benchmarks.measure import Cost, machine, save
from benchmarks.merge import spec

AIM = 1.2
"""Times the floor that a merge may take."""

BLOCK = 8 << 20
"""Bytes that are read and written at once."""

THREADS = 8


def files_of(merge: Mapping[str, object]) -> list[Path]:
    """Return the weight files of a spec's inputs, each once."""
    models = merge["models"]
    assert isinstance(models, list)
    folders = {str(model["model"]) for model in models} | (
        {str(merge["base_model"])} if "base_model" in merge else set()
    )
    return sorted(file for folder in folders for file in Path(folder).glob("*.safetensors"))


def forget(files: Sequence[Path]) -> None:
    """Drop files from the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def floor(files: Sequence[Path], size: int, out: Path) -> float:
    """Return the seconds that reading the files and writing `size` bytes to the disk take, both at once."""
    started = time.perf_counter()
    blocks = [(file, offset) for file in files for offset in range(0, file.stat().st_size, BLOCK)]
    descriptors = {file: os.open(file, os.O_RDONLY) for file in files}
    target = os.open(out, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.posix_fallocate(target, 0, size)
    data = os.urandom(BLOCK)
    with ThreadPoolExecutor(THREADS) as pool:
        reads = [pool.submit(os.pread, descriptors[file], BLOCK, offset) for file, offset in blocks]
        for offset in range(0, size, BLOCK):
            os.pwrite(target, data[: min(BLOCK, size - offset)], offset)
        for read in reads:
            read.result()
    os.fsync(target)
    for descriptor in (target, *descriptors.values()):
        os.close(descriptor)
    seconds = time.perf_counter() - started
    out.unlink()
    return seconds


def once(method: str, models: Path, work: Path, device: str, warm: bool) -> tuple[float, float]:
    """Return the seconds of one merge, and those of its floor."""
    merge = spec(method, models)
    path, out = work / f"{method}.yaml", work / "merged"
    path.write_text(yaml.safe_dump(merge, sort_keys=False))
    files = files_of(merge)
    shutil.rmtree(out, ignore_errors=True)
    if not warm:
        forget(files)
    tool = Path(sys.executable).with_name("toolkit")
    command = [tool, "merge", path, out, "--device", device, "--quiet", "--json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if not warm:
        forget(files)
    return found["seconds"], floor(files, found["write_bytes"], work / "floor.bin")


def report(
    methods: Sequence[str], models: Path, work: Path, device: str, *, repeat: int, warm: bool, out: Path
) -> None:
    """Run, print a table, save."""
    import torch

    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    print(f"{name}; {'warm' if warm else 'cold'} page cache; {machine()}\n")
    print("| method | merge s | read and write s | ratio | aim |\n| --- | --- | --- | --- | --- |")
    results: dict[str, list[Cost]] = {}
    for method in methods:
        runs = [once(method, models, work, device, warm) for _ in range(repeat)]
        merge, disk = (median(values) for values in zip(*runs, strict=True))
        print(f"| {method} | {merge:.2f} | {disk:.2f} | {merge / disk:.2f} | {AIM} |", flush=True)
        for kind, values in zip(("merge", "floor"), zip(*runs, strict=True), strict=True):
            results[f"{method}/{kind}"] = [Cost(0.0, seconds, 0) for seconds in values]
    save(out, "merge on a device", {"torch": torch.__version__, "device": name}, results)
