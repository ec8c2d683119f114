"""The methods that PEFT knows, looked up where PEFT registers them: names, fields and types, and what each needs.

PEFT grows by several methods a year, and `toolkit.adapters.methods` adds to them; so nothing here lists them. Named are
only those that want something else of a training run than the rest.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import TYPE_CHECKING, Any, get_type_hints

if TYPE_CHECKING:
    from peft import PeftConfig

FULL = "full"
"""Not a method of PEFT: the model's own weights are trained."""

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

_OWN_TARGETS = ("adaption_prompt", "beft", "ia3", "ln_tuning", "shadow", "trainable_tokens")
"""Methods that are not for every linear layer; PEFT knows which modules they are for, in the models that it knows."""

_OWN_LOSS = ("adalora", "cpt", "shadow")
"""Methods whose loss is not the model's: they weight it anew, or add to it."""

_IN_CACHE = ("cartridge", "prefix_tuning")
"""Methods whose virtual tokens are keys and values in the cache of every layer."""

REQUIRED = {
    "num_virtual_tokens": "how many vectors to train",
    "token_indices": "which tokens to train",
    "cpt_token_ids": "the tokens of the context to start from",
    "adapter_len": "how many vectors to train in a layer",
    "adapter_layers": "how many of the last layers to train",
    "adapters": "the trained LoRAs, each by a name",
}
"""Fields without which a method does nothing, or fails long after its configuration was made."""


@dataclasses.dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: in lower case.
        config: PEFT's class of its configuration.
    """

    name: str
    config: type[PeftConfig]

    @property
    def types(self) -> dict[str, Any]:
        """The type of every field that a spec may set."""
        hints = get_type_hints(self.config)
        return {f.name: hints[f.name] for f in dataclasses.fields(self.config) if f.init and f.name not in _OURS}

    @property
    def virtual_tokens(self) -> bool:
        """Whether trained vectors stand before the tokens of every row."""
        from peft import PromptLearningConfig

        return issubclass(self.config, PromptLearningConfig)

    @property
    def in_cache(self) -> bool:
        """Whether they stand there as keys and values, which recomputing activations forgets."""
        return self.name in _IN_CACHE

    @property
    def own_loss(self) -> bool:
        """Whether its loss is not the mean over trained tokens alone."""
        return self.name in _OWN_LOSS

    @property
    def optional(self) -> tuple[str, ...]:
        """Fields of `REQUIRED` that follow from others here."""
        return ("num_virtual_tokens",) if "cpt_token_ids" in self.types else ()

    @property
    def task_field(self) -> str | None:
        """The field that counts tasks, where it must be told the task of every row."""
        return next((name for name in ("n_tasks", "num_tasks") if name in self.types), None)

    def defaults(self) -> dict[str, Any]:
        """Return the fields that start with another value than PEFT's own."""
        known = self.types
        values: dict[str, Any] = {"progressbar": False} if "progressbar" in known else {}
        default = {f.name: f.default for f in dataclasses.fields(self.config)}.get("target_modules")
        if "target_modules" in known and default is None and self.name not in _OWN_TARGETS:
            values["target_modules"] = "all-linear"
        return values | {key: value for key, value in UNKNOWN.items() if key in known}


UNKNOWN = {"total_step": 2**31, "hidden_size": 1}
"""What stands in fields of a configuration until the data, or the model, is known."""


def names() -> list[str]:
    """Return every method that a spec may name."""
    return [FULL, *sorted(_methods())]


def find(name: str) -> Method | None:
    """Return a method of PEFT, or `None` where it has none of this name."""
    return _methods().get(name)


@cache
def _methods() -> dict[str, Method]:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    return {
        kind.value.lower(): Method(kind.value.lower(), config) for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    }
