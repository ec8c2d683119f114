"""MHR-z, MHR-mu, tasks that are unknown, and one LoRA per task, against PEFT's own POLY and LoRA."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, PolyConfig, get_peft_model

from tests import tiny
from tests.adapters.laws import IDS, bits, close, randomise, save
from toolkit.adapters.fold import fold
from toolkit.adapters.mhr import add_unknown_task, mixed, poly_layers, routing, train_routing_only

pytestmark = pytest.mark.system("mhr")
TASKS, SKILLS, RANK = 3, 4, 2


def poly(n_splits: int = 2, seed: int = 2) -> PeftModel:
    config = PolyConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        n_tasks=TASKS,
        n_skills=SKILLS,
        n_splits=n_splits,
        target_modules=["q_proj", "up_proj"],
    )
    model = get_peft_model(tiny.llama(), config).eval()
    randomise(model, seed)
    for layer in poly_layers(model).values():
        layer.poly_router["default"].module_logits.data *= 10
    return model


def logits(model: PeftModel, *tasks: int) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS[: len(tasks)], task_ids=torch.tensor(tasks)).logits


def lora_logits(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], rows: int = 2) -> torch.Tensor:
    """Compute with PEFT's LoRA of these factors, scaled by `1 / r`."""
    config = LoraConfig(r=RANK, lora_alpha=1, target_modules=sorted(pairs))
    model = get_peft_model(tiny.llama(), config).eval()
    for name, (a, b) in pairs.items():
        layer = model.get_base_model().get_submodule(name)
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a.contiguous(), b.contiguous()
    with torch.no_grad():
        return model(IDS[:rows]).logits


def skill(layer, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one skill's factors, of all heads, as PEFT's LoRA has them."""
    a, b = layer.poly_lora_A["default"].data[:, index], layer.poly_lora_B["default"].data[:, index]
    return torch.cat(list(a)).T, torch.cat([head.T for head in b])


def set_logits(model: PeftModel, values: torch.Tensor) -> None:
    for layer in poly_layers(model).values():
        layer.poly_router["default"].module_logits.data = values.clone()


@pytest.mark.parametrize("n_splits", [1, 2, 4])
def test_one_lora_per_task_is_peft_with_that_task(tmp_path, n_splits):
    model = poly(n_splits)
    for task in range(TASKS):
        folder = fold(model, tmp_path / str(task), task=task)
        loaded = PeftModel.from_pretrained(tiny.llama(), folder)
        assert loaded.peft_config["default"].r == RANK
        with torch.no_grad():
            close(loaded(IDS).logits, logits(model, task, task))
    assert (logits(model, 0, 0) - logits(model, 1, 1)).abs().max() > 0.1


def test_one_hot_routing_is_that_lora():
    model = poly()
    for index in range(SKILLS):
        row = torch.full((2, SKILLS), -60.0)
        row[:, index] = 60.0
        set_logits(model, row.reshape(1, -1).repeat(TASKS, 1))
        expected = lora_logits({name: skill(layer, index) for name, layer in poly_layers(model).items()})
        close(logits(model, 0, 1), expected)
        pairs = {name: mixed(layer, 2) for name, layer in poly_layers(model).items()}
        close(lora_logits({name: (pair.a.data, pair.b.data) for name, pair in pairs.items()}), expected)


def test_factors_are_mixed_and_not_products():
    layer = next(iter(poly_layers(poly(1)).values()))
    weights = routing(layer, 0)[0]
    pair = mixed(layer, 0)
    products = sum(w * b @ a for w, (a, b) in zip(weights, (skill(layer, i) for i in range(SKILLS)), strict=True))
    factors = sum(w * skill(layer, i)[1] for i, w in enumerate(weights)) @ sum(
        w * skill(layer, i)[0] for i, w in enumerate(weights)
    )
    close((pair.b @ pair.a).detach(), factors.detach())
    assert (pair.b @ pair.a - products).abs().max() > 0.05


def test_equal_routing_of_all_heads_is_poly():
    heads, one = poly(2), poly(1)
    for mine, other in zip(poly_layers(heads).values(), poly_layers(one).values(), strict=True):
        for index in range(SKILLS):
            a, b = skill(mine, index)
            other.poly_lora_A["default"].data[0, index], other.poly_lora_B["default"].data[0, index] = a.T, b.T
        values = other.poly_router["default"].module_logits.data
        mine.poly_router["default"].module_logits.data = values.repeat(1, 2)
    close(logits(heads, 0, 2), logits(one, 0, 2))


def test_unknown_task_is_the_average_of_the_factors_from_which_mu_goes_on(tmp_path):
    model = poly()
    average = {
        name: tuple(sum(skill(layer, i)[side] for i in range(SKILLS)) / SKILLS for side in (0, 1))
        for name, layer in poly_layers(model).items()
    }
    expected = lora_logits(average)
    loaded = PeftModel.from_pretrained(tiny.llama(), fold(model, tmp_path / "mu", task="unknown"), is_trainable=True)
    with torch.no_grad():
        close(loaded(IDS).logits, expected)
    assert {n.split(".")[-3] for n, v in loaded.named_parameters() if v.requires_grad} == {"lora_A", "lora_B"}
    before = [logits(model, task, task) for task in range(TASKS)]
    assert add_unknown_task(model) == TASKS
    close(logits(model, TASKS, TASKS), expected)
    assert all(torch.equal(logits(model, task, task), old) for task, old in enumerate(before))
    stock = PeftModel.from_pretrained(tiny.llama(), save(model, tmp_path / "more"))
    assert stock.peft_config["default"].n_tasks == TASKS + 1
    assert torch.equal(logits(stock, TASKS, 1), logits(model, TASKS, 1))


def test_equal_skills_are_that_skill():
    model = poly()
    for layer in poly_layers(model).values():
        for factors in (layer.poly_lora_A["default"], layer.poly_lora_B["default"]):
            factors.data = factors.data[:, :1].repeat(1, SKILLS, 1, 1)
    expected = lora_logits({name: skill(layer, 0) for name, layer in poly_layers(model).items()})
    for task in range(TASKS):
        close(logits(model, task, task), expected)


def test_weights_are_shares():
    for layer in poly_layers(poly()).values():
        for task in (*range(TASKS), "unknown"):
            weights = routing(layer, task)
            assert (weights >= 0).all()
            torch.testing.assert_close(weights.sum(-1), torch.ones(2))
        assert torch.equal(routing(layer, "unknown"), torch.full((2, SKILLS), 1 / SKILLS))
    with pytest.raises(ValueError, match="task 3 of 3; the first is 0"):
        routing(layer, 3)


def test_z_changes_the_logits_alone():
    model = poly()
    train_routing_only(model)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    assert trained.keys() == {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained
    assert all("poly_router" in name for name in trained)
    before = bits(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    torch.manual_seed(0)
    model.train()(IDS, labels=IDS, task_ids=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    changed = {name for name, value in bits(model).items() if not torch.equal(value, before[name])}
    assert changed == set(trained)


def test_evaluation_is_deterministic_and_training_seeded():
    model = poly()
    assert torch.equal(logits(model, 0, 1), logits(model, 0, 1))
    model.train()
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(logits(model, 0, 1))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_rows_of_several_tasks_are_each_alone():
    model = poly()
    both = logits(model, 2, 0)
    close(both[:1], logits(model, 2))
    with torch.no_grad():
        close(both[1:], model(IDS[1:], task_ids=torch.tensor([0])).logits)


def test_no_poly_adapter():
    with pytest.raises(ValueError, match="no POLY adapter 'other'"):
        poly_layers(poly(), "other")
