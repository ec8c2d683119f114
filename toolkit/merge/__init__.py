"""Merging: fix a composition of deltas offline and write it out.

The package is also the function: `toolkit.merge(spec, out)` runs a merge. Python binds a subpackage's name in its
parent as soon as anything imports it, so `toolkit.merge` is this module whether or not the function was asked for
first; a module that can be called makes both uses work.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a merge; see `toolkit.merge.run.merge`."""
        from toolkit.merge.run import merge

        return merge(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
