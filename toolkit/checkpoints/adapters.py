"""LoRA folders in PEFT's format, read without PEFT or torch.

PEFT computes `y = W x + scale * B A x`. Here every pair is kept as the change of the stored weight itself,
`delta = scale * rows @ cols`, whatever orientation the weight is stored in: for a linear `rows = B` and
`cols = A`; for an embedding and for GPT-2's Conv1D, whose weights are transposed, `rows = A^T` and `cols = B^T`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.checkpoints.dtypes import Floats
from toolkit.checkpoints.locate import locate
from toolkit.checkpoints.reader import FolderCheckpoint, read_json
from toolkit.errors import CheckpointError, MissingError, UnsupportedError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_VOLATILE = ("base_model_name_or_path", "inference_mode", "peft_version", "auto_mapping", "revision", "task_type")
_UNREADABLE = (
    "alora_invocation_tokens",
    "use_qalora",
    "monteclora_config",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "arrow_config",
    "kasa_config",
    "megatron_config",
)
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PART = re.compile(r"^(.*)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight|\.bias)?$")


@dataclass(frozen=True)
class LowRank:
    """A low-rank change of one weight matrix: `delta = scale * rows @ cols`.

    Attributes:
        rows: `[M, r]` float32.
        cols: `[r, N]` float32.
        scale: `alpha / r`, or `alpha / sqrt(r)` for rsLoRA.
        magnitude: DoRA's norm per output, `[M]` (`[N]` where `transposed`), or `None`.
        transposed: the weight is stored `[in, out]` (Conv1D, embeddings).
    """

    rows: Floats
    cols: Floats
    scale: float
    magnitude: Floats | None = None
    transposed: bool = False

    @property
    def rank(self) -> int:
        """Rank of the pair."""
        return self.cols.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight that it changes."""
        return self.rows.shape[0], self.cols.shape[1]


@dataclass(frozen=True)
class _Parts:
    """Names of the stored tensors of one adapted module."""

    a: str
    b: str
    embedding: bool
    magnitude: str | None = None


class Adapter:
    """A LoRA folder: LoRA, rsLoRA and DoRA on linears and embeddings, patterns, `modules_to_save`, trained biases.

    Opening it checks that every pair multiplies and that every scale can be computed; no weights are read.

    Attributes:
        config: its `adapter_config.json`.
        parts: adapted modules of the model, such as `model.layers.0.self_attn.q_proj`.
        whole: tensors of the model that the folder stores whole -> name of the stored tensor.
    """

    def __init__(self, folder: Path, source: str = "") -> None:
        self.folder = folder
        self.source = source or str(folder)
        self.config: dict[str, Any] = read_json(folder / CONFIG)
        self._check_kind()
        self._check_scales()
        self.store = FolderCheckpoint(folder / WEIGHTS, self.source)
        self.parts, self.whole = _sort_parts(self.store.tensors, self.source)
        for module, part in self.parts.items():
            self._check_pair(module, part)

    def _check_kind(self) -> None:
        kind = self.config.get("peft_type")
        if kind != "LORA":
            raise UnsupportedError(f"{self.source}: adapters of type {kind} cannot be read as weight changes")
        used = [key for key in _UNREADABLE if self.config.get(key)]
        init = str(self.config.get("init_lora_weights"))
        if used:
            raise UnsupportedError(f"{self.source}: adapter uses {', '.join(used)}, which cannot be read here")
        if init.startswith(_CHANGES_BASE):
            raise UnsupportedError(
                f"{self.source}: init_lora_weights={init!r} changed the base it was trained on; save it with PEFT's"
                " path_initial_model_for_weight_conversion first"
            )

    def _check_scales(self) -> None:
        if not _is_positive(alpha := self.config.get("lora_alpha", 8)):
            raise self._bad_setting("lora_alpha", f"expected a number above 0, got {alpha!r}")
        for key in ("alpha_pattern", "rank_pattern"):
            patterns = self.config.get(key)
            if patterns is not None and not isinstance(patterns, dict):
                raise self._bad_setting(key, f"expected names of modules and their values, got {patterns!r}")
            for pattern, value in (patterns or {}).items():
                if not _compiles(_as_regex(pattern)):
                    raise self._bad_setting(key, f"{pattern!r} is not a regular expression")
                if not _is_positive(value):
                    raise self._bad_setting(key, f"{pattern!r}: expected a number above 0, got {value!r}")

    def _bad_setting(self, key: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {CONFIG}: {key}: {what}")

    def _check_pair(self, module: str, part: _Parts) -> None:
        for name in (part.a, part.b, part.magnitude):
            if name and not self.store.info(name).dtype.floating:
                raise CheckpointError(f"{self.source}: {name}: expected floats, got {self.store.info(name).dtype.name}")
        a, b = self.store.info(part.a).shape, self.store.info(part.b).shape
        # [r, in] and [out, r], of embeddings too: [r, V] and [H, r].
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] < 1:
            raise CheckpointError(
                f"{self.source}: module {module}: A is {list(a)} and B is {list(b)};"
                " expected [rank, in] and [out, rank] with a rank of at least 1"
            )
        if part.magnitude and (count := self.store.info(part.magnitude).count) != b[0]:
            raise CheckpointError(f"{self.source}: {part.magnitude}: {count} magnitudes for {b[0]} outputs")

    @property
    def base_model(self) -> str | None:
        """Base that the adapter says it was trained on."""
        return self.config.get("base_model_name_or_path")

    @property
    def is_dora(self) -> bool:
        """Whether any module has a magnitude."""
        return any(part.magnitude for part in self.parts.values())

    @cached_property
    def targets(self) -> dict[str, str]:
        """Weights of the model that a low-rank pair changes -> adapted module."""
        return {f"{module}.weight": module for module in self.parts}

    @property
    def touched(self) -> set[str]:
        """Tensors of the model that differ from the base."""
        return set(self.targets) | set(self.whole)

    def rank(self, module: str) -> int:
        """Return the rank of a module's pair."""
        part = self.parts[module]
        return self.store.info(part.a).shape[0]

    def shape(self, module: str) -> tuple[int, int]:
        """Return the shape of the stored weight that a module's pair changes."""
        part = self.parts[module]
        outputs, inputs = self.store.info(part.b).shape[0], self.store.info(part.a).shape[1]
        return (inputs, outputs) if self._is_transposed(part) else (outputs, inputs)

    def _is_transposed(self, part: _Parts) -> bool:
        return part.embedding or bool(self.config.get("fan_in_fan_out"))

    def scale(self, module: str) -> float:
        """Return what the product of the pair is multiplied with."""
        patterns: Mapping[str, float] = self.config.get("alpha_pattern") or {}
        pattern = next((p for p in patterns if re.match(_as_regex(p), module)), None)
        alpha = patterns[pattern] if pattern else self.config.get("lora_alpha", 8)
        rank = self.rank(module)
        return float(alpha / sqrt(rank) if self.config.get("use_rslora") else alpha / rank)

    def low_rank(self, module: str) -> LowRank:
        """Read the pair of a module."""
        part = self.parts[module]
        a, b = self._matrix(part.a), self._matrix(part.b)
        magnitude = None if part.magnitude is None else self._matrix(part.magnitude).reshape(-1)
        transposed = self._is_transposed(part)
        rows, cols = (a.T, b.T) if transposed else (b, a)
        return LowRank(
            np.ascontiguousarray(rows), np.ascontiguousarray(cols), self.scale(module), magnitude, transposed
        )

    def _matrix(self, name: str) -> Floats:
        info = self.store.info(name)
        out = np.empty(info.count, np.float32)
        self.store.read(name, 0, info.count, out)
        return out.reshape(info.shape)

    @cached_property
    def content_hash(self) -> str:
        """Identity of what the adapter computes: 32 hex digits over its weights and the settings that matter."""
        digest = hashlib.blake2b(digest_size=16)
        settings = {k: v for k, v in self.config.items() if k not in _VOLATILE}
        if isinstance(settings.get("target_modules"), list):
            settings["target_modules"] = sorted(settings["target_modules"], key=str)
        digest.update(json.dumps(settings, sort_keys=True).encode())
        with (self.folder / WEIGHTS).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def close(self) -> None:
        """Close the file of the weights."""
        self.store.close()

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.store.nbytes

    def describe(self) -> str:
        """Say in a few words what kind of adapter this is."""
        kind = "DoRA" if self.is_dora else "rsLoRA" if self.config.get("use_rslora") else "LoRA"
        ranks = sorted({self.rank(module) for module in self.parts})
        return f"{kind}, rank {ranks[0] if len(ranks) == 1 else ranks}, {len(self.parts)} modules"


def is_adapter(path: Path) -> bool:
    """Tell whether a folder holds a PEFT adapter."""
    return (path / CONFIG).is_file()


def open_adapter(source: str | Path) -> Adapter:
    """Open a PEFT folder, local or on the hub.

    Raises:
        MissingError: nothing there, or no adapter.
        CheckpointError: broken files.
        UnsupportedError: not a LoRA, or a variant that is more than a change of weights.
    """
    folder = locate(source)
    if not is_adapter(folder):
        raise MissingError(f"{source}: no {CONFIG} in this folder")
    if not (folder / WEIGHTS).is_file():
        what = "only pickled weights" if (folder / "adapter_model.bin").is_file() else f"no {WEIGHTS}"
        raise CheckpointError(f"{source}: {what} in this folder")
    return Adapter(folder, str(source))


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) and value > 0


def _as_regex(pattern: str) -> str:
    """Return what PEFT matches a module's name with for a key of `alpha_pattern` or `rank_pattern`."""
    return rf"(.*\.)?({pattern})$"


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _sort_parts(names: Iterable[str], source: str) -> tuple[dict[str, _Parts], dict[str, str]]:
    """Sort the tensors of an adapter file into pairs and whole tensors; a stray one is an error."""
    pieces: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for name in names:
        plain = name.removeprefix(_PREFIX)
        match = _PART.match(plain)
        if match and match[3] == ".bias":
            raise UnsupportedError(f"{source}: {name}: a bias of the low-rank pair (lora_bias) cannot be read here")
        if match:
            pieces.setdefault(match[1], {})[match[2]] = name
        elif "lora_" in plain:
            raise UnsupportedError(f"{source}: {name}: not a part of LoRA or DoRA")
        else:
            whole[plain.replace(".base_layer.", ".")] = name
    parts: dict[str, _Parts] = {}
    for module, found in sorted(pieces.items()):
        embedding = "lora_embedding_A" in found
        a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        if a not in found or b not in found:
            raise CheckpointError(f"{source}: module {module} lacks {b if a in found else a}")
        parts[module] = _Parts(found[a], found[b], embedding, found.get("lora_magnitude_vector"))
    if not parts and not whole:
        raise CheckpointError(f"{source}: the adapter holds no tensors")
    return parts, whole
