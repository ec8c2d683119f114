"""Compile what operations launch and print what it takes, as JSON; see `harness.compile_in_process`.

A process of its own: one that interprets cannot compile.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace

import torch

from tests.kernels import launches
from toolkit.kernels.launch import Configuration, Launch, Table, compile_for, record


def main() -> None:
    """Compile cases for a generation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("generation", type=int)
    parser.add_argument("cases", nargs="+", help="functions of tests.kernels.launches")
    parser.add_argument("--all", action="store_true", help="every configuration of the tables")
    options = parser.parse_args()
    found: dict[str, dict] = {}
    for launched, configuration in wanted(options.cases, options.generation, options.all):
        entry = {"kernel": launched.name, "dtype": str(dtype(launched)).removeprefix("torch.")}
        entry |= {"constants": dict(configuration.constants)}
        entry |= {"warps": configuration.num_warps, "stages": configuration.num_stages}
        key = json.dumps(entry, sort_keys=True)
        if key not in found:
            resources = asdict(compile_for(options.generation, launched, configuration))
            found[key] = entry | resources | {"spills": configuration.spills}
    print(json.dumps(list(found.values())))


def wanted(cases: list[str], generation: int, whole_table: bool) -> Iterator[tuple[Launch, Configuration]]:
    """Yield what is to be compiled."""
    for case in cases:
        with record(run=False, generation=generation) as launched:
            table: Table = getattr(launches, case)()
        for one in launched:
            # A kernel of another operation has its table there.
            own = whole_table and one.name in table.kernels(generation)
            bits = one.configuration.constants.get("BITS", 0)
            rows = table.all(one.name, generation, dtype(one).itemsize, bits) if own else [one.configuration]
            for row in rows:
                yield one, replace(row, constants={**one.configuration.constants, **row.constants})


def dtype(launched: Launch) -> torch.dtype:
    """Return the type of the factors: inner products and scales are float32 whatever they are."""
    tensors = [v for v in launched.arguments.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    return min((v.dtype for v in tensors), key=lambda d: d.itemsize)


if __name__ == "__main__":
    main()
