"""From the `adapter:` block of a spec to PEFT's own configuration, with PEFT's fields and types.

And what else of a spec can be checked against the libraries before a model is loaded.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from toolkit.adapters.spec import AdapterSpec, TrainSpec
from toolkit.errors import Problem
from toolkit.names import did_you_mean

if TYPE_CHECKING:
    from peft import PeftConfig

_OURS = (
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
)
"""Fields that the toolkit sets itself."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to start that change the base as well, so that the adapter alone says nothing."""


def faults(spec: TrainSpec) -> list[Problem]:
    """Return what PEFT, transformers and the installed packages find wrong with a spec."""
    if spec.adapter.method == "full":
        found = [Problem(f"adapter.{key}", f"full has no field {key!r}") for key in spec.adapter.fields]
    else:
        found = peft_config(spec.adapter)[1]
    return [*found, *_optimizer_faults(spec), *_report_faults(spec)]


def _optimizer_faults(spec: TrainSpec) -> Iterator[Problem]:
    from transformers.training_args import OptimizerNames

    name, known = spec.training.optimizer, [str(kind.value) for kind in OptimizerNames]
    if name not in known:
        yield Problem("training.optimizer", f"no optimizer {name!r}{did_you_mean(name, known)}")


def _report_faults(spec: TrainSpec) -> Iterator[Problem]:
    for index, name in enumerate(spec.training.report_to):
        if name != "tensorboard" and find_spec(name) is None:
            yield Problem(
                f"training.report_to[{index}]", f"{name} is not installed; pip install {name}, or leave it out"
            )


def peft_config(spec: AdapterSpec) -> tuple[PeftConfig | None, list[Problem]]:
    """Build the configuration of a spec's method; return it, or what is wrong with the spec."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    kind: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(spec.method.upper())]
    types = get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind) if f.init and f.name not in _OURS]
    values: dict[str, Any] = {"target_modules": "all-linear"} if "target_modules" in known else {}
    found: list[Problem] = []
    for key, value in spec.fields.items():
        if key not in known:
            found.append(Problem(f"adapter.{key}", f"{spec.method} has no field {key!r}{did_you_mean(key, known)}"))
            continue
        found += [Problem(f"adapter.{key}", message) for message in _value_faults(key, value)]
        try:
            values[key] = TypeAdapter(types[key]).validate_python(value)
        except ValidationError as error:
            found.append(Problem(f"adapter.{key}", f"{error.errors()[0]['msg']}, got {value!r}"))
        except PydanticUserError:  # a type of PEFT's own that pydantic cannot read; PEFT checks it below
            values[key] = value
    if found:
        return None, found
    try:
        return kind(task_type="CAUSAL_LM", **values), []
    except (ImportError, TypeError, ValueError) as error:
        return None, [Problem("adapter", f"PEFT refuses it: {' '.join(str(error).split())}")]


def _value_faults(key: str, value: Any) -> Iterator[str]:
    """Say what is wrong with a value that PEFT would find at the first module of a model, or not at all."""
    if key == "init_lora_weights" and str(value).startswith(_CHANGES_BASE):
        yield (
            f"{value} changes the base that it is trained on, so that the adapter alone cannot be used;"
            " take true, gaussian or orthogonal"
        )
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
