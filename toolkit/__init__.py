"""Composition Toolkit: a model is a base plus a composition of deltas.

The names below are imported when they are first used, so that `import toolkit` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.adapters.train import train
    from toolkit.jobs.align import align
    from toolkit.jobs.bench_serve.run import bench_serve
    from toolkit.jobs.evaluate import evaluate
    from toolkit.jobs.inspect import inspect
    from toolkit.jobs.quickstart import quickstart
    from toolkit.jobs.recipe import run_recipe as run
    from toolkit.jobs.route import evaluate_router, explain_route
    from toolkit.jobs.search.run import search
    from toolkit.jobs.skills import write_skills
    from toolkit.merge.extract import extract
    from toolkit.merge.learning.learn import learn
    from toolkit.merge.moe.build import build_moe
    from toolkit.merge.plan import make_plan as plan_merge
    from toolkit.merge.run import merge
    from toolkit.merge.verify import verify as verify_merge
    from toolkit.models.load import load_model
    from toolkit.routing.calibrate import calibrate_router
    from toolkit.routing.compare import compare_routers
    from toolkit.routing.fit import fit_router
    from toolkit.routing.fusion.run import fuse_logits
    from toolkit.routing.router import Router, load_router
    from toolkit.serving.engine import Engine
    from toolkit.serving.request import Sampling
    from toolkit.serving.serve import background_server, serve

_PUBLIC = {
    "Engine": "toolkit.serving.engine:Engine",
    "Router": "toolkit.routing.router:Router",
    "Sampling": "toolkit.serving.request:Sampling",
    "align": "toolkit.jobs.align:align",
    "background_server": "toolkit.serving.serve:background_server",
    "bench_serve": "toolkit.jobs.bench_serve.run:bench_serve",
    "build_moe": "toolkit.merge.moe.build:build_moe",
    "calibrate_router": "toolkit.routing.calibrate:calibrate_router",
    "compare_routers": "toolkit.routing.compare:compare_routers",
    "evaluate": "toolkit.jobs.evaluate:evaluate",
    "evaluate_router": "toolkit.jobs.route:evaluate_router",
    "explain_route": "toolkit.jobs.route:explain_route",
    "extract": "toolkit.merge.extract:extract",
    "fit_router": "toolkit.routing.fit:fit_router",
    "fuse_logits": "toolkit.routing.fusion.run:fuse_logits",
    "inspect": "toolkit.jobs.inspect:inspect",
    "learn": "toolkit.merge.learning.learn:learn",
    "load_model": "toolkit.models.load:load_model",
    "load_router": "toolkit.routing.router:load_router",
    "merge": "toolkit.merge.run:merge",
    "plan_merge": "toolkit.merge.plan:make_plan",
    "quickstart": "toolkit.jobs.quickstart:quickstart",
    "run": "toolkit.jobs.recipe:run_recipe",
    "search": "toolkit.jobs.search.run:search",
    "serve": "toolkit.serving.serve:serve",
    "train": "toolkit.adapters.train:train",
    "verify_merge": "toolkit.merge.verify:verify",
    "write_skills": "toolkit.jobs.skills:write_skills",
}

__all__ = [
    "Engine",
    "Router",
    "Sampling",
    "align",
    "background_server",
    "bench_serve",
    "build_moe",
    "calibrate_router",
    "compare_routers",
    "evaluate",
    "evaluate_router",
    "explain_route",
    "extract",
    "fit_router",
    "fuse_logits",
    "inspect",
    "learn",
    "load_model",
    "load_router",
    "merge",
    "plan_merge",
    "quickstart",
    "run",
    "search",
    "serve",
    "train",
    "verify_merge",
    "write_skills",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'toolkit' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
