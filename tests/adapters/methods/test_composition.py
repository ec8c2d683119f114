"""`composition` as a method: the laws; what its trees compute is tested beside the package that holds them."""

from __future__ import annotations

from tests.adapters.laws import HIDDEN, LAYERS, Example
from tests.adapters.methods.test_scalearn import lora

QUERIES = ["q_proj", "c_attn"]
SOURCES = {name: lora(2, QUERIES) for name in ("first", "one", "two", "three")}
TREE = {"stack": ["first", {"average": ["one", {"fuse": ["two", "three"]}], "weights": [0.5, 2.0]}]}
EXAMPLE = Example({"sources": SOURCES, "compose": TREE}, count=2 * HIDDEN * LAYERS, starts_at_base=False)


def test_example_is_a_tree():
    from toolkit.adapters.compose.tree import data, parse

    assert data(parse(TREE))["stack"][1]["weights"] == [0.5, 2.0]
