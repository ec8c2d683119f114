"""From the `adapter:` block of a spec to PEFT's own configuration, with PEFT's fields and types.

And what else of a spec can be checked against the libraries before a model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from toolkit.adapters import catalogue
from toolkit.adapters.catalogue import FULL, Method
from toolkit.adapters.parts import part_faults
from toolkit.adapters.spec import AdapterSpec, TrainSpec
from toolkit.errors import Problem
from toolkit.names import did_you_mean

if TYPE_CHECKING:
    from peft import PeftConfig

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to start that change the base as well, so that the adapter alone says nothing."""


def faults(spec: TrainSpec) -> list[Problem]:
    """Return what PEFT, transformers and the installed packages find wrong with a spec."""
    if spec.adapter.method == FULL:
        found = [Problem(f"adapter.{key}", f"full has no field {key!r}") for key in spec.adapter.fields]
    else:
        found = peft_config(spec.adapter)[1] or list(_method_faults(spec))
    found += [*part_faults(spec), *_optimizer_faults(spec), *_report_faults(spec), *_package_faults(spec)]
    return found


def _method_faults(spec: TrainSpec) -> Iterator[Problem]:
    """Say what of a run a method cannot do."""
    method = catalogue.find(spec.adapter.method)
    assert method
    if spec.data.packing and method.virtual_tokens:
        yield Problem(
            "data.packing",
            f"{method.name} puts its virtual tokens before a whole row, so that only the first of several documents"
            " would have them; set it to false",
        )
    if spec.data.packing and spec.adapter.fields.get("alora_invocation_tokens"):
        yield Problem("data.packing", "an activated LoRA knows one invocation per row; set it to false")
    yield from _task_faults(spec, method)
    if spec.training.gradient_checkpointing and method.in_cache:
        yield Problem(
            "training.gradient_checkpointing",
            f"{method.name} keeps its virtual tokens in the cache, which is not there when activations are recomputed;"
            " set it to false",
        )


def _task_faults(spec: TrainSpec, method: Method) -> Iterator[Problem]:
    if method.task_field is None:
        return
    count = spec.adapter.fields.get(method.task_field, 1)
    named = {source.task for source in spec.data.sources() if source.task}
    if len(named) > count:
        yield Problem(f"adapter.{method.task_field}", f"expected {len(named)}, the number of tasks in data.train")
    for key, validation in (("train", False), ("validation", True)):
        for index, source in enumerate(spec.data.sources(validation)):
            if count > 1 and source.task not in named:
                what = f"expected one of {', '.join(sorted(named))}" if validation and named else "required"
                yield Problem(f"data.{key}[{index}].task", f"{what}: {method.name} learns {count} tasks")


def _optimizer_faults(spec: TrainSpec) -> Iterator[Problem]:
    from transformers.training_args import OptimizerNames

    name, known = spec.training.optimizer, [str(kind.value) for kind in OptimizerNames]
    if name not in known:
        yield Problem("training.optimizer", f"no optimizer {name!r}{did_you_mean(name, known)}")


def _report_faults(spec: TrainSpec) -> Iterator[Problem]:
    packages = {"tensorboard": "tensorboardX", "plot": "matplotlib"}
    for index, name in enumerate(spec.training.report_to):
        package = packages.get(name, name)
        if find_spec(package) is None:
            yield Problem(
                f"training.report_to[{index}]", f"{package} is not installed; pip install {package}, or leave it out"
            )


def _package_faults(spec: TrainSpec) -> Iterator[Problem]:
    """Say what a run needs that is not there."""
    sharded = spec.training.fsdp or spec.training.deepspeed
    if sharded and spec.save_dtype:
        yield Problem("save_dtype", "a model that several processes hold is saved as it is trained; leave it out")
    if sharded and spec.quantization:
        yield Problem("quantization", "is for one process or data parallelism; leave it out, or fsdp and deepspeed")
    if spec.training.deepspeed is not None and find_spec("deepspeed") is None:
        yield Problem("training.deepspeed", "deepspeed is not installed; pip install deepspeed, or leave it out")
    if spec.quantization is not None:
        import torch

        missing = [] if torch.cuda.is_available() else ["a GPU, and there is none"]
        missing += [] if find_spec("bitsandbytes") else ["bitsandbytes (pip install bitsandbytes)"]
        if not isinstance(spec.base, str):
            yield Problem("quantization", "needs a base on disk or on the hub, not one in memory")
        if missing:
            yield Problem("quantization", f"{spec.quantization} needs {' and '.join(missing)}; or leave it out")


def peft_config(spec: AdapterSpec, task_type: str = "CAUSAL_LM") -> tuple[PeftConfig | None, list[Problem]]:
    """Build the configuration of a spec's method; return it, or what is wrong with the spec."""
    method = catalogue.find(spec.method)
    if method is None:
        known = catalogue.names()
        message = f"no method {spec.method!r}{did_you_mean(spec.method, known)} (known: {', '.join(known)})"
        return None, [Problem("adapter.method", message)]
    values, found = _values(method, spec)
    if found:
        return None, found
    try:
        return method.config(task_type=task_type, **values), []
    except (ImportError, TypeError, ValueError) as error:
        return None, [Problem("adapter", f"PEFT refuses it: {' '.join(str(error).split())}")]


def _values(method: Method, spec: AdapterSpec) -> tuple[dict[str, Any], list[Problem]]:
    """Return the fields of a configuration with PEFT's types, and what is wrong with those of the spec."""
    types, values = method.types, method.defaults()
    found: list[Problem] = []
    for key, value in spec.fields.items():
        if key not in types:
            found.append(Problem(f"adapter.{key}", f"{method.name} has no field {key!r}{did_you_mean(key, types)}"))
            continue
        found += [Problem(f"adapter.{key}", message) for message in _value_faults(key, value)]
        try:
            values[key] = TypeAdapter(types[key]).validate_python(value)
        except ValidationError as error:
            found.append(Problem(f"adapter.{key}", f"{error.errors()[0]['msg']}, got {value!r}"))
        except PydanticUserError:  # a type of PEFT's own that pydantic cannot read; PEFT checks it
            values[key] = value
    if spec.layers is not None:
        if "layers_to_transform" not in types:
            found.append(Problem("adapter.layers", f"{method.name} cannot be put on some layers only"))
        elif "layers_to_transform" in spec.fields:
            found.append(Problem("adapter.layers", "says the same as layers_to_transform; give one of them"))
        elif isinstance(values.get("target_modules"), str) and values["target_modules"] != "all-linear":
            found.append(
                Problem("adapter.layers", "the expression of target_modules says which layers; give one of them")
            )
    return values, [*found, *_missing(method, values), *_cross_faults(method, values)]


def _missing(method: Method, values: dict[str, Any]) -> Iterator[Problem]:
    for key, what in catalogue.REQUIRED.items():
        if key in method.types and not values.get(key) and key not in method.optional:
            yield Problem(f"adapter.{key}", f"required by {method.name}: {what}")


def _cross_faults(method: Method, values: dict[str, Any]) -> Iterator[Problem]:
    """Say which fields do not go together, where PEFT would find it in the midst of training, or not at all."""
    if method.name == "adalora" and values.get("init_r", 12) <= values.get("target_r", 8):
        yield Problem("adapter.init_r", "expected more than target_r: adalora starts with more ranks than it keeps")
    kinds = values.get("cpt_tokens_type_mask")
    if method.name == "cpt" and (not kinds or max(kinds) % 4):
        yield Problem(
            "adapter.cpt_tokens_type_mask",
            "expected one number per token of cpt_token_ids, the largest of them a multiple of 4 (that of the last"
            " answer); with another PEFT trains no token of your rows",
        )


def _value_faults(key: str, value: Any) -> Iterator[str]:
    """Say what is wrong with a value that PEFT would find at the first module of a model, or not at all."""
    if key == "init_lora_weights" and str(value).startswith(_CHANGES_BASE):
        yield (
            f"{value} changes the base that it is trained on, so that the adapter alone cannot be used;"
            " take true, gaussian or orthogonal"
        )
    if key == "init_lora_weights" and value == "eva":
        yield "eva starts from the data, which PEFT does not see here; take true, gaussian or orthogonal"
    if key == "lora_alpha" and isinstance(value, int | float) and value <= 0:
        yield f"expected a number above 0, got {value!r}; with it the adapter changes nothing"
    if key in ("rank_pattern", "alpha_pattern") and isinstance(value, dict):
        for pattern, number in value.items():
            if not _compiles(str(pattern)):
                yield f"{pattern!r} is not a regular expression"
            if isinstance(number, bool) or not isinstance(number, int | float) or number <= 0:
                yield f"{pattern!r}: expected a number above 0, got {number!r}"
    if key in ("target_modules", "exclude_modules") and isinstance(value, str) and not _compiles(value):
        yield f"{value!r} is not a regular expression; name modules in a list"


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True
