"""Make PEFT know methods that it does not have, without importing it before someone else does.

PEFT's list of types is an enum and closed; a member is added to it at run time, so that its own `from_pretrained` and
transformers' `load_adapter` find the configuration and the model of a method by the type in `adapter_config.json`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from toolkit.names import available

if TYPE_CHECKING:
    from peft import PeftType

METHODS = "toolkit.adapters.methods"


def register_with_peft() -> None:
    """Register every method of the folder with PEFT, now or at the end of PEFT's import."""
    if "peft" in sys.modules:
        _import_methods()
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())


def add_peft_type(name: str) -> PeftType:
    """Add a member to PEFT's enum of types, or return the one that it has.

    Args:
        name: of the method, in lower case.
    """
    from peft import PeftType

    value = name.upper()
    if value in PeftType.__members__:
        return PeftType[value]
    member: Any = str.__new__(PeftType, value)
    member._name_, member._value_, member.__objclass__ = value, value, PeftType
    member._sort_order_ = len(PeftType)
    PeftType._member_names_.append(value)
    PeftType._member_map_[value] = member
    PeftType._value2member_map_[value] = member
    type.__setattr__(PeftType, value, member)  # the enum's own refuses to
    return member


def _import_methods() -> None:
    for name in available(METHODS):
        importlib.import_module(f"{METHODS}.{name}")  # each registers itself


class _AfterPeft(MetaPathFinder):
    """Finds PEFT as everyone does, and has the methods imported once it is there."""

    searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft" or self.searching:
            return None
        self.searching = True
        try:
            spec = find_spec("peft")
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenMethods(spec.loader)
        return spec


class _ThenMethods(Loader):
    """A module's own loader, and the methods after it."""

    def __init__(self, own: Loader) -> None:
        self.own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.own
        if module.__spec__ is not None:
            module.__spec__.loader = self.own
        self.own.exec_module(module)
        _import_methods()
