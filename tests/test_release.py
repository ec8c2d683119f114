"""What is released: the wheel holds all that it needs, and workflows and container run commands that exist."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from what git knows of, in a tree of its own."""
    pytest.importorskip("setuptools_scm")
    folder = tmp_path_factory.mktemp("tree")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True)
    for name in names.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file() and name.split("/")[0] not in ("tests", "benchmarks", "docs"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder / "dist"),
        str(folder),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return next((folder / "dist").glob("*.whl"))


def test_wheel_holds_every_file_of_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    listed = subprocess.run(["git", "ls-files", "toolkit"], cwd=ROOT, capture_output=True, text=True, check=True)
    missing = [name for name in listed.stdout.split() if (ROOT / name).is_file() and name not in held]
    assert not missing


def test_wheel_runs_in_an_environment_of_its_own(wheel, tmp_path):
    """The commands, the embedded base and the server's page, from the wheel alone; what it depends on is lent."""
    place = tmp_path / "clean"
    venv.create(place, with_pip=False)
    site = next(place.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    code = (
        "import toolkit, sys, pathlib\nfrom toolkit.cli import main\n"
        f"assert pathlib.Path(toolkit.__file__).is_relative_to({str(site)!r}), toolkit.__file__\n"
        "assert main(['inspect', 'toolkit:base', '--json']) == 0\n"
        "page = pathlib.Path(toolkit.__file__).parent / 'serving' / 'web' / 'index.html'\nassert page.is_file()\n"
    )
    run = subprocess.run(
        [place / "bin" / "python", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_what_exists(path):
    workflow: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = [step["run"] for step in steps if "run" in step]
    assert commands
    for command in commands:
        assert set(re.findall(r"\bmake ([a-z-]+)", command)) <= targets, command
        for module in re.findall(r"-m (benchmarks[\w.]*)", command):
            assert (
                ROOT.joinpath(*module.split(".")).is_dir()
                or ROOT.joinpath(*module.split(".")).with_suffix(".py").is_file()
            )
        for folder in re.findall(r"pytest (tests\S*)", command):
            assert (ROOT / folder).exists()


def test_tests_run_on_every_supported_python():
    versions = [f"3.{minor}" for minor in (11, 12, 13)]
    jobs: Any = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python-version"] == versions
    assert jobs["package"]["strategy"]["matrix"]["python-version"] == versions


def container_steps() -> list[str]:
    text = (ROOT / "Containerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"^RUN (.*)", text, re.MULTILINE)


def test_container_is_installed_as_everybody_installs():
    install, *rest = container_steps()
    assert install.startswith("python3 tools/install.py --venv /opt/toolkit --extras serve")
    assert rest == ["useradd --create-home toolkit"]


@pytest.mark.slow
def test_install_step_of_the_container(tmp_path):
    """In a clean environment; what is left of it is the base image's and a user, which only a build would show."""
    step = container_steps()[0].replace("/opt/toolkit", str(tmp_path / "toolkit")).replace('"${TORCH_INDEX}"', '""')
    subprocess.run(step, shell=True, cwd=ROOT, check=True)
    shown = subprocess.run(
        [tmp_path / "toolkit" / "bin" / "toolkit", "--help"], capture_output=True, text=True, check=True
    )
    assert "quickstart" in shown.stdout
