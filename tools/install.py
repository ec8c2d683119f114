"""Make a virtual environment and install the toolkit into it; needs nothing but Python 3.11 or newer.

    python3 tools/install.py [--venv .venv] [--extras serve] [--torch-index URL]

torch goes in first, alone and at the version of constraints.txt, so that nothing pulls a second one: its CPU build
where no accelerator is found and pip knows such a build, else the usual one. Run again, it does only what is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"


def main() -> None:
    """Install."""
    if sys.version_info < (3, 11):  # noqa: UP036 - run by whatever Python the user has
        sys.exit(f"error: Python {platform.python_version()} is too old; the toolkit needs 3.11 or newer")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="the virtual environment")
    parser.add_argument("--extras", default="serve", help="extras of the toolkit, comma-separated")
    parser.add_argument("--torch-index", default="", help="package index to take torch from")
    options = parser.parse_args()
    python = options.venv / "bin" / "python"
    if not python.exists():
        print(f"making {options.venv}")
        subprocess.run([sys.executable, "-m", "venv", options.venv], check=True)
    stamp = options.venv / ".installed"
    wanted = fingerprint(options.extras)
    done = stamp.read_text().split() if stamp.is_file() else []
    if wanted in done:
        return
    if not has_torch(python):
        install_torch(python, options.torch_index)
    print(f"installing the toolkit with [{options.extras}]")
    pip(python, "install", "--quiet", "--constraint", str(CONSTRAINTS), "--editable", f"{ROOT}[{options.extras}]")
    stamp.write_text("\n".join([*done, wanted]))


def fingerprint(extras: str) -> str:
    """Return what decides whether an installation is up to date."""
    parts = [extras, CONSTRAINTS.read_text(), (ROOT / "pyproject.toml").read_text(), platform.python_version()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def has_torch(python: Path) -> bool:
    """Tell whether the environment has torch."""
    return (
        subprocess.run(
            [python, "-c", "import importlib.metadata as m; m.version('torch')"], capture_output=True
        ).returncode
        == 0
    )


def install_torch(python: Path, index: str) -> None:
    """Install torch, its CPU build where that is enough and to be had."""
    version = re.search(r"^torch==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE)
    if version is None:
        sys.exit(f"error: {CONSTRAINTS} does not pin torch")
    source = ["--index-url", index] if index else []
    if not index and not has_accelerator():
        print(f"installing torch {version[1]}, CPU build")
        if pip(python, "install", "--quiet", f"torch=={version[1]}+cpu", check=False):
            return
        print("pip knows no CPU build; taking the usual one (TORCH_INDEX=URL names another index)")
    print(f"installing torch {version[1]}")
    pip(python, "install", "--quiet", *source, f"torch=={version[1]}")


def has_accelerator() -> bool:
    """Tell whether the machine has one that a build of torch could use; elsewhere than on Linux there is one build."""
    if platform.system() != "Linux":
        return True
    return bool(shutil.which("nvidia-smi") or shutil.which("rocm-smi") or Path("/dev/kfd").exists())


def pip(python: Path, *arguments: str, check: bool = True) -> bool:
    """Run pip; without `check` it may fail quietly."""
    run = subprocess.run([python, "-m", "pip", *arguments], capture_output=not check, text=True)
    if check and run.returncode:
        sys.exit("error: pip failed; see above")
    return run.returncode == 0


if __name__ == "__main__":
    main()
