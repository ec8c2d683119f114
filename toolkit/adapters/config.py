"""From the `adapter:` block of a spec to PEFT's own configuration, with PEFT's fields and types."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from toolkit.adapters.spec import AdapterSpec
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
    except (TypeError, ValueError) as error:
        return None, [Problem("adapter", f"PEFT refuses it: {' '.join(str(error).split())}")]
