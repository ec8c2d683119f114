"""`vl_adapter`: bottlenecks in hooks, Kronecker products written out, generated adapters, and rows of several tasks."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from tests import tiny
from tests.adapters.laws import HIDDEN, IDS, LAYERS, Example, attach, close, config_of, logits, randomise, save
from toolkit.adapters.methods.vl_adapter import VlAdapterConfig, VlAdapterLayer, takes_task_ids, tasks
from toolkit.adapters.train import train
from toolkit.data.rows import write_rows

pytestmark = pytest.mark.system("vl_adapter")

SIZE, BLOCKS, TASKS = 8, 4, 3
PLACES = 2 * LAYERS
PAIR, BIASES = 2 * SIZE * HIDDEN, SIZE + HIDDEN
COMPACT = BLOCKS * (SIZE + HIDDEN) // BLOCKS * 2
"""`u` and `v` of both projections, of rank 1: `blocks * (out + in) / blocks` numbers each."""

COMPACTER = {"kind": "compacter", "size": SIZE, "blocks": BLOCKS}
RULES = 2 * 2 * BLOCKS**3
"""Of two kinds of sublayers and two projections."""

HYPERFORMER = {"kind": "hyperformer", "size": SIZE, "task_size": 5, "inner_size": 6}
EXAMPLE = Example(COMPACTER, RULES + PLACES * (COMPACT + BIASES), folds=False, is_lora=False)


def adapted(strength: float = 0.3, **fields) -> PeftModel:
    model = attach(tiny.llama(), "vl_adapter", **({"n_tasks": TASKS, "size": SIZE} | fields))
    randomise(model, strength=strength)
    return model


def layers(model: torch.nn.Module) -> list[VlAdapterLayer]:
    return [module for module in model.modules() if isinstance(module, VlAdapterLayer)]


def hooked(model: PeftModel, task: int) -> torch.Tensor:
    """Compute one task with the same projections in hooks on a plain model."""
    plain = tiny.llama()
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, VlAdapterLayer):
            values = [v.detach()[min(task, len(v) - 1)] for v in layer.projections("default")]

            def add(module, args, output, values=values):
                down, down_bias, up, up_bias = values
                y = output[0] if isinstance(output, tuple) else output
                y = y + torch.nn.functional.gelu(y @ down.T + down_bias) @ up.T + up_bias
                return (y, *output[1:]) if isinstance(output, tuple) else y

            plain.get_submodule(name).register_forward_hook(add)
    return logits(plain)


KINDS = [{"share": share} for share in ("none", "down", "up", "both")]
KINDS += [COMPACTER, COMPACTER | {"share": "down", "phm_rank": 0}, HYPERFORMER]


@pytest.mark.parametrize("fields", KINDS)
def test_every_task_is_its_bottleneck_and_rows_of_several_do_not_mix(fields):
    model = adapted(**fields)
    alone = []
    for task in range(TASKS):
        with tasks(model, [task, task]):
            alone.append(logits(model))
        close(alone[-1], hooked(model, task))
    with tasks(model, [2, 0]):
        mixed = logits(model)
    close(mixed[0], alone[2][0])
    close(mixed[1], alone[0][1])
    same = fields.get("share") == "both"
    assert torch.equal(alone[0], alone[1]) is same


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"share": "none"}, PLACES * TASKS * (PAIR + BIASES)),
        ({"share": "both"}, PLACES * (PAIR + BIASES)),
        ({"share": "down"}, PLACES * (PAIR // 2 + SIZE + TASKS * (PAIR // 2 + HIDDEN))),
        ({"share": "up"}, PLACES * (PAIR // 2 + HIDDEN + TASKS * (PAIR // 2 + SIZE))),
        (COMPACTER, RULES + PLACES * TASKS * (COMPACT + BIASES)),
        (COMPACTER | {"phm_rank": 2, "share": "both"}, RULES + PLACES * (2 * COMPACT + BIASES)),
        (COMPACTER | {"phm_rank": 0}, RULES + PLACES * TASKS * (PAIR // BLOCKS + BIASES)),
        (HYPERFORMER, 2 * (TASKS * 5 + LAYERS * 5 + 6 * 10 + 6 * (PAIR + BIASES))),
        ({"sublayers": ["ffn"]}, LAYERS * TASKS * (PAIR + BIASES)),
    ],
)
def test_counts(fields, count):
    model = attach(tiny.llama(), "vl_adapter", **({"n_tasks": TASKS, "size": SIZE} | fields))
    assert sum(v.numel() for v in model.parameters() if v.requires_grad) == count


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_compacter_is_a_sum_of_kronecker_products(rank):
    layer = layers(adapted(**COMPACTER, phm_rank=rank))[3]
    down = layer.projections("default")[0]
    rule = layer._shared("default", "down_rule")
    for task in range(TASKS):
        factors = layer.tensor("default", "down_right")[task]
        if rank:
            factors = layer.tensor("default", "down_left")[task] @ factors
        close(down[task].detach(), sum(torch.kron(rule[i], factors[i]) for i in range(BLOCKS)).detach(), 1e-6)
    assert all(one._shared("default", "down_rule") is rule for one in layers_like(layer))


def layers_like(layer: VlAdapterLayer) -> list[VlAdapterLayer]:
    return [layer, layer.holders["default"]]


def test_one_block_is_a_dense_adapter():
    dense, compact = adapted(), adapted(kind="compacter", blocks=1, phm_rank=0)
    for one, other in zip(layers(dense), layers(compact), strict=True):
        for side in ("down", "up"):
            if other.has("default", f"{side}_rule"):
                other.tensor("default", f"{side}_rule").data.fill_(1)
            other.tensor("default", f"{side}_right").data = one.tensor("default", side).data[:, None]
            other.tensor("default", f"{side}_bias").data = one.tensor("default", f"{side}_bias").data
    for task in range(TASKS):
        with tasks(dense, [task]), tasks(compact, [task]):
            close(logits(compact), logits(dense), 1e-6)


def test_equal_embeddings_get_equal_adapters():
    model = adapted(**HYPERFORMER)
    first = layers(model)[0]
    first.tensor("default", "task_embedding").data[1] = first.tensor("default", "task_embedding").data[0]
    for value in first.projections("default"):
        torch.testing.assert_close(value[0], value[1])
        assert not torch.allclose(value[0], value[2])


@pytest.mark.parametrize("fields", KINDS)
def test_only_what_a_task_uses_is_trained_by_it(fields):
    model = adapted(**fields | ({"inner_size": 32} if fields is HYPERFORMER else {}))
    with tasks(model, [1, 1]):
        model(IDS, labels=IDS).loss.backward()
    own = {"down", "up", "down_bias", "up_bias", "down_left", "down_right", "up_left", "up_right", "task_embedding"}
    for layer in layers(model):
        for name in own:
            if layer.has("default", name) and len(grad := layer.tensor("default", name).grad) == TASKS:
                assert grad[1].any()
                assert not grad[0].any()
                assert not grad[2].any()


def test_task_ids_reach_the_layers_and_are_needed(tmp_path):
    model = adapted()
    with pytest.raises(ValueError, match="name the task of every row"):
        logits(model)
    takes_task_ids(model)
    with tasks(adapted(), [2, 1]):
        pass
    with torch.no_grad():
        got = model(IDS, task_ids=torch.tensor([2, 1])).logits
    loaded = PeftModel.from_pretrained(tiny.llama(), save(model, tmp_path))
    with tasks(loaded, [2, 1]):
        assert torch.equal(logits(loaded), got)
        out = loaded.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, num_beams=2)
    assert out.shape[0] == 2
    with tasks(loaded, [3, 0]), pytest.raises(ValueError, match=r"tasks \[3, 0\] for 2 rows; they are 0 to 2"):
        logits(loaded)


def test_a_spec_trains_several_tasks(base, tmp_path):
    """Each source's task trains its own projections, and the validation loss is that of PEFT with these tasks."""
    sources = []
    for task, text in (("plus", "1"), ("minus", "2")):
        path = tmp_path / f"{task}.jsonl"
        write_rows(path, [{"prompt": f"number {i} is ", "completion": text} for i in range(8)])
        sources.append({"path": str(path), "task": task})
    spec = {
        "base": str(base),
        "adapter": {"method": "vl_adapter", "n_tasks": 2, "size": 4},
        "data": {"train": sources, "validation": sources},
        "training": {"max_steps": 12, "batch_size": 4, "learning_rate": 2e-2},
        "device": "cpu",
    }
    result = train(spec, tmp_path / "out", quiet=True)
    loaded = PeftModel.from_pretrained(tiny.llama(), result.path)
    ids = torch.tensor([list(b"number 3 is ")])
    answers = []
    for task in (0, 1):
        with tasks(loaded, [task]):
            answers.append(int(logits(loaded, ids)[0, -1].argmax()))
    assert answers == [ord("1"), ord("2")], "tasks are numbered as they come"


def test_mistakes():
    with pytest.raises(ValueError, match="kind is one of"):
        VlAdapterConfig(kind="other")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="n_tasks, blocks"):
        config_of("vl_adapter", n_tasks=0)
    with pytest.raises(ValueError, match="5 blocks do not divide a projection of 48 to 8"):
        attach(tiny.llama(), "vl_adapter", size=8, kind="compacter", blocks=5)
