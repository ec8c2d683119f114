"""Many tensors, and large ones: time that grows with their number, memory that does not grow with their size."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.merge.test_laws import NAMES, example
from toolkit.checkpoints.dtypes import DTYPES, encode
from toolkit.checkpoints.headers import TensorInfo
from toolkit.checkpoints.writer import WeightsWriter
from toolkit.merge.method import load_method

MOST_MEMORY = 300 << 20


def run(spec: dict[str, Any], folder: Path, *options: str) -> tuple[float, int]:
    """Merge in a process of its own; return its CPU seconds and the most bytes that were resident."""
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    code = (
        "import re, resource, sys\n"
        "from pathlib import Path\n"
        "from toolkit.cli import main\n"
        "assert main(['merge', *sys.argv[1:], '-q', '--json']) == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules and 'peft' not in sys.modules\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "peak = re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]\n"
        "print('took', used.ru_utime + used.ru_stime, peak)\n"
    )
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-c", code, folder / "spec.yaml", folder / "out", *options],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    found = re.search(r"took (\S+) (\d+)", done.stdout)
    assert found
    return float(found[1]), int(found[2]) * 1024


def test_sixteen_thousand_tensors(tmp_path):
    """As many as a mixture of 128 experts has in 48 layers; mergekit did not end within nine minutes."""
    layout = [
        TensorInfo(f"model.layers.{layer}.mlp.experts.{expert}.w{part}.weight", DTYPES["BF16"], (8, 8))
        for layer in range(42)
        for expert in range(127)
        for part in range(3)
    ]
    assert len(layout) > 16_000
    rng = np.random.default_rng(0)
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        writer = WeightsWriter(tmp_path / name, {"model.safetensors": layout})
        for tensor in layout:
            writer.write(tensor.name, 0, encode(rng.standard_normal(64, np.float32), DTYPES["BF16"]))
        writer.close()
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 0.5}} for name in ("a", "b")]
    spec = {"merge_method": "ties", "base_model": str(tmp_path / "base"), "models": models}
    cpu, resident = run(spec | {"parameters": {"density": 0.5}}, tmp_path)
    assert cpu < 30
    assert resident < MOST_MEMORY


ROWS, WIDTH = 131_072, 4096


@pytest.fixture(scope="module", params=[0, 37], ids=["1 GB", "6 GB"])
def large(request, tmp_path_factory) -> Iterator[dict[str, Path]]:
    """Models of one filled tensor of 1 GB, alone or with 5 GB of others, which are holes in the file."""
    root = tmp_path_factory.mktemp("large")
    dtype, rng = DTYPES["BF16"], np.random.default_rng(0)
    layout = [TensorInfo("model.embed_tokens.weight", dtype, (ROWS, WIDTH))]
    more = range(request.param)
    layout += [TensorInfo(f"model.layers.{i}.mlp.up_proj.weight", dtype, (ROWS // 8, WIDTH)) for i in more]
    base = rng.standard_normal(1 << 24, np.float32)
    found = {}
    for name in ("base", "a", "b"):
        folder = found[name] = root / name
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(os, "posix_fallocate")  # files are then as long, and empty
            writer = WeightsWriter(folder, {"model.safetensors": layout})
        block = base if name == "base" else base + np.float32(0.05) * rng.standard_normal(len(base), np.float32)
        for start in range(0, layout[0].count, len(block)):
            # Each part in another order, so that no two are alike and the sample of a few tells of all.
            writer.write(layout[0].name, start, encode(np.roll(block, start >> 20), dtype))
        writer.close()
    yield found
    shutil.rmtree(root)


def spec_of(large: dict[str, Path], method: str) -> dict[str, Any]:
    loaded, own = load_method(method), dict(example(method).params)
    count = min(2, loaded.models[1] or 2)
    parameters = {}
    for key, value in own.items():
        parameters[key] = value[0] if key in loaded.per_model else value
    spec = {"merge_method": method, "models": [{"model": str(large[name])} for name in ("a", "b")[:count]]}
    if method == "signatures":
        spec["models"] = [
            {"model": str(large[name]), "parameters": {"role": role}}
            for name, role in zip(("a", "b"), own["role"], strict=False)
        ]
        parameters.pop("role")
    base = {"base_model": str(large["base"])} if loaded.needs_base or loaded.base_first or count == 1 else {}
    return spec | base | {"parameters": parameters}


BOUNDED = [name for name in NAMES if load_method(name).scope != "tensor" and not load_method(name).statistics]


@pytest.mark.slow
@pytest.mark.parametrize("method", BOUNDED)
def test_memory_is_bounded_at_any_size(method, large, request, tmp_path):
    """All methods on the tensor of 1 GB; one of those that hold most on the model of 6 GB."""
    if "6 GB" in request.node.name and method != "ties":
        pytest.skip("takes minutes, and has nothing larger than the smaller model")
    _, resident = run(spec_of(large, method), tmp_path)
    shutil.rmtree(tmp_path / "out")
    assert resident < MOST_MEMORY, f"{resident >> 20} MiB"
