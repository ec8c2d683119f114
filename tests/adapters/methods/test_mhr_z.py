"""`mhr_z` against PEFT's POLY with the same routing, and what a run through a spec changes."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, PolyConfig, get_peft_model
from safetensors.torch import load_file

from tests import tiny
from tests.adapters.laws import IDS, LAYERS, LINEARS, Example, attach, close, logits, randomise, save
from toolkit.adapters.methods.mhr_z import MhrZConfig, MhrZLinear
from toolkit.adapters.train import train
from toolkit.data.rows import write_rows

pytestmark = pytest.mark.system("mhr")

SKILLS, HEADS = 3, 2
EXAMPLE = Example(
    {"r": 2, "n_skills": SKILLS, "n_splits": HEADS},
    count=LAYERS * len(LINEARS) * SKILLS * HEADS,
    starts_at_base=False,
)


@pytest.fixture
def poly(tmp_path):
    """A random POLY of three tasks, and its folder."""
    config = PolyConfig(
        task_type="CAUSAL_LM", r=2, n_tasks=3, n_skills=SKILLS, n_splits=HEADS, target_modules=["q_proj", "up_proj"]
    )
    model = get_peft_model(tiny.llama(), config).eval()
    randomise(model)
    for name, value in model.named_parameters():
        if "module_logits" in name:
            value.data *= 10
    return model, str(save(model, tmp_path / "poly"))


def layers(model: torch.nn.Module) -> list[MhrZLinear]:
    return [module for module in model.modules() if isinstance(module, MhrZLinear)]


@pytest.mark.parametrize("task", [0, 1, 2])
def test_starts_as_the_task_it_is_told(poly, task):
    model, folder = poly
    with torch.no_grad():
        expected = model(IDS, task_ids=torch.tensor([task, task])).logits
    close(logits(attach(tiny.llama(), "mhr_z", source=folder, task=task)), expected)


def test_starts_with_all_skills_alike(poly):
    adapted = attach(tiny.llama(), "mhr_z", source=poly[1])
    assert all(torch.equal(one.routing("default"), torch.full((HEADS, SKILLS), 1 / SKILLS)) for one in layers(adapted))
    for name, value in poly[0].named_parameters():
        if "module_logits" in name:
            value.data.zero_()
    with torch.no_grad():
        expected = poly[0](IDS, task_ids=torch.tensor([0, 0])).logits
    close(logits(adapted), expected)


def test_routing_that_is_sure_is_that_skill():
    layer = layers(attach(tiny.llama(), "mhr_z", **EXAMPLE.config))[0]
    for skill in range(SKILLS):
        value = torch.full((HEADS, SKILLS), -60.0)
        value[:, skill] = 60.0
        layer.tensor("default", "logits").data = value
        a, b, scale = layer.low_rank("default")
        close(a.detach(), torch.cat(list(layer.tensor("default", "a")[:, skill])).T)
        close(b.detach(), torch.cat([head.T for head in layer.tensor("default", "b")[:, skill]]))
        assert scale == 0.5


def test_a_spec_trains_the_routing_alone(poly, base, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{i} is ", "completion": str(i % 3)} for i in range(12)])
    spec = {
        "base": str(base),
        "adapter": {"method": "mhr_z", "source": poly[1], "task": 1},
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "training": {"max_steps": 3, "learning_rate": 0.1},
        "device": "cpu",
    }
    result = train(spec, tmp_path / "out", quiet=True)
    assert result.numbers["trainable_parameters"] == LAYERS * 2 * HEADS * SKILLS
    before, after = (
        load_file(f"{poly[1]}/adapter_model.safetensors"),
        load_file(result.path / "adapter_model.safetensors"),
    )
    for name, value in after.items():
        stem, _, kind = name.rpartition(".mhr_z_")
        if kind == "logits":
            assert not torch.equal(value, before[f"{stem}.poly_router.module_logits"][1].reshape(HEADS, SKILLS))
        else:
            assert torch.equal(value, before[f"{stem}.poly_lora_{kind.upper()}"])
    (tmp_path / "poly").rename(tmp_path / "gone")
    assert logits(PeftModel.from_pretrained(tiny.llama(), result.path)).isfinite().all()


def test_mistakes(poly, tmp_path):
    with pytest.raises(ValueError, match="task 3 of 3"):
        attach(tiny.llama(), "mhr_z", source=poly[1], task=3)
    other = attach(tiny.llama(), "hydra_lora")
    with pytest.raises(ValueError, match=r"expected a POLY adapter, .* is HYDRA_LORA"):
        attach(tiny.llama(), "mhr_z", source=str(save(other, tmp_path / "hydra")))
    with pytest.raises(ValueError, match="nothing to route"):
        MhrZConfig(n_skills=1)
    with pytest.raises(ValueError, match="5 heads do not divide its sizes 48 and 48"):
        attach(tiny.llama(), "mhr_z", n_splits=5)
