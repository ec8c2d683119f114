"""The files that make weights a model: config, generation config, tokenizer, chat template, model card."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from toolkit.checkpoints.dtypes import DType
from toolkit.checkpoints.reader import Checkpoint
from toolkit.checkpoints.writer import write_text

TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template*",
    "additional_chat_templates/*",
)
OTHER_FILES = ("generation_config.json", "preprocessor_config.json", "processor_config.json", "*.py")
"""Beside the tokenizer; Python files are the code that some models bring, copied and never run here."""


def copy_companions(source: Path, out: Path, patterns: Sequence[str] = (*TOKENIZER_FILES, *OTHER_FILES)) -> list[str]:
    """Copy the files beside the weights; return their names."""
    copied = []
    for path in sorted({p for pattern in patterns for p in source.glob(pattern) if p.is_file()}):
        target = out / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        copied.append(str(path.relative_to(source)))
    return copied


def write_config(donor: Checkpoint, out: Path, dtype: DType | None, changes: Mapping[str, Any] | None = None) -> None:
    """Write `config.json` as the donor has it, with the dtype that the weights now have."""
    if not donor.config:
        return
    config = dict(donor.config) | dict(changes or {})
    if dtype is not None:
        # transformers 5 writes `dtype` where earlier ones wrote `torch_dtype`.
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype.torch
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")


def write_card(
    out: Path,
    title: str,
    summary: str,
    *,
    tags: Sequence[str],
    base: Sequence[str] = (),
    spec: Mapping[str, Any] | None = None,
    details: str = "",
    library: str = "transformers",
    libraries: Sequence[str] = (),
) -> None:
    """Write the model card: front matter that the hub reads, what was done, and the spec that does it again.

    Args:
        out: folder of the model.
        title: heading.
        summary: first paragraph.
        tags: for the hub, besides the toolkit's own.
        base: models that this one was made from.
        spec: that makes it again.
        details: further paragraphs, such as tables.
        library: that loads the model.
        libraries: distributions whose versions are named besides the toolkit's and numpy's.
    """
    front: dict[str, Any] = {"library_name": library, "tags": ["composition-toolkit", *tags]}
    if base:
        front["base_model"] = list(base)
    parts = [f"---\n{yaml.safe_dump(front, sort_keys=False)}---", f"# {title}", summary]
    if details:
        parts.append(details)
    if spec is not None:
        parts.append(f"## Spec\n\n```yaml\n{yaml.safe_dump(dict(spec), sort_keys=False)}```")
    parts.append(f"Made with {versions_text(*libraries)}.")
    write_text(out / "README.md", "\n\n".join(parts) + "\n")


def file_hashes(paths: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of files, by name."""
    found = {}
    for path in paths:
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def versions(*extra: str) -> dict[str, str]:
    """Return the versions of the toolkit and of the named distributions that are installed."""
    found = {}
    for name in ("composition-toolkit", "numpy", *extra):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def versions_text(*extra: str) -> str:
    """Write the versions for a sentence."""
    return ", ".join(f"{name} {number}" for name, number in versions(*extra).items())
