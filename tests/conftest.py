"""Fixtures that several tests share; folders are made once per process and never changed."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported: several threads in several test processes slow each other down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before triton is imported, which PEFT does: kernels run on the CPU, slowly.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

from tests import tiny

SHARED_DATA = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, float32."""
    return tiny.save_model(tiny.llama(), tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="session")
def loras(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LoRA folders of several kinds and ranks on that base."""
    root = tmp_path_factory.mktemp("loras")
    kinds = {
        "plain": {},
        "wide": {"r": 7, "lora_alpha": 3},
        "few": {"r": 2, "target_modules": ["q_proj", "down_proj"]},
        "rslora": {"r": 4, "use_rslora": True},
        "dora": {"r": 3, "use_dora": True},
        "patterns": {"rank_pattern": {"q_proj": 6, "layers.1.mlp.up_proj": 1}, "alpha_pattern": {"v_proj": 32}},
    }
    return {name: tiny.save_lora(base, root / name, seed=i, **config) for i, (name, config) in enumerate(kinds.items())}


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the repository; tests that need it are skipped where it is missing."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the real data folder, which is not part of the repository")
    return SHARED_DATA
