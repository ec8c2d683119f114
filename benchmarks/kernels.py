"""Compile every configuration of the kernels' tables and say what it takes: `python -m benchmarks.kernels`.

No GPU is needed. Prints a table and writes `benchmarks/results/kernel_resources.json`.
"""

from __future__ import annotations

import json
from pathlib import Path

import triton

from tests.kernels.harness import compile_in_process
from toolkit.kernels.launch import GENERATIONS

LORA = ["decode", "decode_float32", "prefill", "prefill_float32", "backward", "embedding"]
ATTENTION = [f"attend_in_{what}{dtype}" for what in ("prefill", "training", "decode") for dtype in ("", "_float32")]
CODES = ["attend_to_codes", "attend_to_half_codes", "quantize", "quantize_to_half_codes"]
DELTAS = [f"{what}_in_{when}" for what in ("masks", "signs") for when in ("decode", "prefill")]
FLOAT32 = ["masks_in_decode_float32", "masks_in_prefill_float32"]
CASES = [*LORA, *ATTENTION, *CODES, *DELTAS, *FLOAT32, "merge", "merge_weights"]
RESULTS = Path(__file__).parent / "results" / "kernel_resources.json"


def main() -> None:
    """Compile, print, write."""
    found = {str(g): compile_in_process(CASES, g, whole_table=True) for g in GENERATIONS}
    print(f"{'sm':>3} {'kernel':<14} {'dtype':<9} {'warps':>5} {'registers':>9} {'stack':>5} {'shared':>7}  constants")
    for generation, kernels in found.items():
        for k in kernels:
            constants = " ".join(f"{name}={value}" for name, value in k["constants"].items())
            print(
                f"{generation:>3} {k['kernel']:<14} {k['dtype']:<9} {k['warps']:>5} {k['registers']:>9} {k['stack']:>5}"
                f" {k['shared']:>7}  {constants}"
            )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"triton": triton.__version__, "kernels": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
