"""Configurations are chosen by size, launches are recorded, and nothing runs where it cannot."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from tests.kernels.harness import INTERPRETED, ROOT
from toolkit.errors import UnsupportedError
from toolkit.kernels.impl import resolve
from toolkit.kernels.launch import GENERATIONS, Configuration, Table, generation_of, launch, record

ROWS = [
    {"from": {}, "BLOCK": 16, "num_warps": 1, "num_stages": 1},
    {"from": {"width": 64}, "BLOCK": 32, "num_warps": 2, "num_stages": 1, "max_registers": 96},
    {"from": {"width": 64, "bytes": 4}, "BLOCK": 8, "num_warps": 4, "num_stages": 2, "spills": "a reason"},
]


@pytest.fixture
def table(tmp_path) -> Table:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"80": {"kernel": ROWS}}))
    return Table(path)


def test_the_last_configuration_whose_bounds_are_reached(table):
    blocks = [table.choose("kernel", 80, width=w, bytes=b).constants["BLOCK"] for w, b in ((63, 4), (64, 2), (99, 4))]
    assert blocks == [16, 32, 8]
    assert table.choose("kernel", 80, width=64, bytes=4) == Configuration({"BLOCK": 8}, 4, 2, None, "a reason")
    options = {"num_warps": 2, "num_stages": 1, "maxnreg": 96, "enable_fp_fusion": True}
    assert table.choose("kernel", 80, width=64, bytes=2).options == options


def test_all_are_those_that_can_be_chosen(table):
    assert [c.constants["BLOCK"] for c in table.all("kernel", 80, 2)] == [16, 32]
    assert [c.constants["BLOCK"] for c in table.all("kernel", 80, 4)] == [16, 8]


class Kernel:
    """Stands for a compiled kernel; remembers its grid and arguments."""

    def __init__(self):
        self.fn, self.calls = self, []

    def __getitem__(self, grid):
        return lambda **given: self.calls.append((grid, given))


def test_launches_are_recorded_and_empty_grids_are_none():
    kernel, x = Kernel(), torch.zeros(1)
    kernel.__name__ = "kernel"
    with record() as launches:
        launch(kernel, (3, 2), {"x": x}, Configuration({"BLOCK": 16}, 4, 2))
        launch(kernel, (3, 0), {"x": x}, Configuration({"BLOCK": 16}, 4, 2))
    assert [(one.name, one.grid) for one in launches] == [("kernel", (3, 2))]
    options = {"num_warps": 4, "num_stages": 2, "maxnreg": None, "enable_fp_fusion": True}
    assert kernel.calls == [((3, 2), {"x": x, "BLOCK": 16, **options})]
    with record(run=False) as launches:
        launch(kernel, (1,), {"x": x}, Configuration({}, 4, 2))
    assert len(launches) == len(kernel.calls) == 1


def test_a_cpu_is_no_gpu_unless_it_interprets():
    code = (
        "import torch; from toolkit.errors import UnsupportedError; from toolkit.kernels.launch import generation_of\n"
        "try: generation_of(torch.device('cpu'))\nexcept UnsupportedError as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={"PATH": "", "PYTHONPATH": ":".join(sys.path)}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert "TRITON_INTERPRET=1" in run.stdout
    if INTERPRETED:
        assert generation_of(torch.device("cpu")) == 90


def test_triton_is_the_default_on_a_gpu_only():
    forms = ("triton", "torch", "reference")
    assert resolve(None, forms, torch.device("cpu"), "op") == "torch"
    assert resolve(None, forms, torch.device("cuda"), "op") == "triton"
    assert resolve("triton", forms, torch.device("cpu"), "op") == "triton"
    with pytest.raises(UnsupportedError, match="has no form"):
        resolve("triton", forms[1:], torch.device("cuda"), "op")


def test_no_kernel_adds_by_atomics():
    """Results do not change between runs, and nothing is zeroed first."""
    files = sorted((ROOT / "toolkit" / "kernels").glob("*/triton.py"))
    assert len(files) > 5
    assert not [file for file in files if "tl.atomic" in file.read_text()]


OPERATIONS = sorted(path.parent for path in (ROOT / "toolkit" / "kernels").glob("*/triton.py"))


@pytest.mark.parametrize("folder", OPERATIONS, ids=lambda folder: folder.name)
def test_every_operation_has_the_same_files(folder):
    """So that a new one can be made like any of them; fast forms never rest on the specification."""
    names = {path.name for path in folder.glob("*.*")}
    assert {"__init__.py", "api.py", "reference.py", "triton.py", "triton_form.py", "table.json"} <= names
    for name in ("triton.py", "triton_form.py"):
        assert ".reference" not in (folder / name).read_text()
    kernels = {generation: Table(folder / "table.json").kernels(generation) for generation in GENERATIONS}
    assert len({tuple(names) for names in kernels.values()}) == 1
    code = (folder / "triton.py").read_text()
    assert all(f"def {name}(" in code for name in kernels[90])
    assert f"`{folder.name}`" in (ROOT / "docs" / "kernels.md").read_text() or folder.name == "grouped_lora"
