"""`parallel_adapter` against the same arithmetic in hooks on a plain model."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.adapters.laws import HIDDEN, LAYERS, Example, attach, close, gpt2, logits, randomise
from tests.adapters.methods.test_bottleneck import hooked
from toolkit.adapters.methods.parallel_adapter import ParallelAdapterConfig

SIZE = 6
EXAMPLE = Example({"size": SIZE}, LAYERS * (2 * HIDDEN * SIZE + SIZE + HIDDEN), folds=False, is_lora=False)


@pytest.mark.system("unified_peft")
@pytest.mark.parametrize("make", [tiny.llama, gpt2])
@pytest.mark.parametrize("sublayers", [["ffn"], ["attention"], ["attention", "ffn"]])
def test_is_a_bottleneck_beside_the_sublayer(make, sublayers):
    model = attach(make(), "parallel_adapter", size=SIZE, sublayers=sublayers)
    randomise(model)
    plain, count = hooked(make(), model, torch.relu, parallel=True)
    assert count == len(sublayers) * LAYERS
    close(logits(model), logits(plain), 1e-6)


@pytest.mark.system("unified_peft")
def test_reads_what_enters_and_not_what_leaves():
    outputs = []
    for method in ("parallel_adapter", "bottleneck"):
        model = attach(tiny.llama(), method, size=SIZE)
        randomise(model)
        outputs.append(logits(model))
    assert (outputs[0] - outputs[1]).abs().max() > 0.1


def test_wrong_sublayers():
    for wrong in (["heads"], []):
        with pytest.raises(ValueError, match="sublayers are attention and ffn, not"):
            ParallelAdapterConfig(sublayers=wrong)
