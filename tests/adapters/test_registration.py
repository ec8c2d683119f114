"""PEFT knows the methods once `toolkit.adapters` is imported, in any order, and nothing heavy is imported for it."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType
from peft.utils import register_peft_method

from tests import tiny
from tests.adapters.laws import attach, logits, randomise, save
from toolkit.adapters.registration import METHODS, add_peft_type
from toolkit.names import available


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_package_is_light():
    code = "import sys, toolkit.adapters; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    assert run(code) == "[]"


@pytest.mark.parametrize(
    "imports",
    [
        "import toolkit.adapters, peft",
        "import peft, toolkit.adapters",
        "import toolkit.adapters.methods.mos, peft",
        "import toolkit.adapters; from peft.tuners import lora; import peft",
    ],
)
def test_every_order_of_imports(imports):
    code = "print(type(peft.__spec__.loader).__name__, *(t.value for t in peft.PEFT_TYPE_TO_CONFIG_MAPPING))"
    loader, *names = run(f"{imports}; {code}").split()
    assert {name.upper() for name in available(METHODS)} < set(names)
    assert loader == "SourceFileLoader"


def test_member_is_like_those_of_peft():
    member = PeftType("MOS")
    assert member is PeftType.MOS is PeftType["MOS"]
    assert isinstance(member, PeftType)
    assert member == "MOS"
    assert member in list(PeftType)
    assert list(PeftType).count(member) == 1
    assert (member.name, member.value) == ("MOS", "MOS")
    assert repr(member) == "<PeftType.MOS: 'MOS'>"
    assert copy.deepcopy(member) is pickle.loads(pickle.dumps(member)) is member
    assert json.dumps(member) == '"MOS"'
    assert add_peft_type("mos") is member
    assert add_peft_type("lora") is PeftType.LORA


def test_name_that_peft_has_is_refused():
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType("MOS")]
    with pytest.raises(KeyError, match="already PEFT method called 'mos'"):
        register_peft_method(name="mos", config_cls=config, model_cls=None)


def test_fresh_process_loads_what_this_one_saved(tmp_path):
    base = tiny.save_model(tiny.llama(), tmp_path / "base")
    model = attach(tiny.llama(), "mos", r=2)
    randomise(model)
    save(model, tmp_path / "adapter")
    code = (
        "import torch, toolkit.adapters; from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(base)!r})\n"
        f"model = PeftModel.from_pretrained(model, {str(tmp_path / 'adapter')!r})\n"
        "print(model(torch.tensor([[5, 9, 101]])).logits.double().abs().sum().item())"
    )
    expected = logits(model)[:1, :3].double().abs().sum().item()
    assert float(run(code)) == pytest.approx(expected, rel=1e-5)
    without = code.replace(", toolkit.adapters", "")
    failed = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True)
    assert "KeyError" in failed.stderr, "stock PEFT alone is loud"
