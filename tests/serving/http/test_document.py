"""What docs/serving.md lists is what there is."""

from __future__ import annotations

import re
from pathlib import Path

from toolkit.serving.engine import Engine
from toolkit.serving.http.adapters import AdapterBody, LoadBody
from toolkit.serving.http.bodies import ChatBody, CompletionBody
from toolkit.serving.http.embeddings import EmbeddingBody
from toolkit.serving.http.fine_tuning import JobBody
from toolkit.serving.http.metrics import Metrics
from toolkit.serving.server import Access, build_app
from toolkit.serving.spec import FineTuning, Limits, ServeSpec

TEXT = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")


def named(section: str) -> set[str]:
    """Everything in backticks in the first column of a section's table."""
    part = TEXT.split(f"## {section}\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_fields_of_bodies():
    fields = {name for body in (CompletionBody, ChatBody, EmbeddingBody) for name in body.model_fields}
    not_served = set(re.findall(r"`(\w+)`", TEXT.split("| `pooling`")[1].split("are taken where")[0].split("|\n")[-1]))
    assert named("What a request can ask for") == fields - not_served
    assert not_served == {"best_of", "suffix", "store", "service_tier", "dimensions"}
    assert set(AdapterBody.model_fields) == {"name", "path"}
    assert all(f"`{name}`" in TEXT for name in LoadBody.model_fields)


def test_endpoints(base):
    with Engine(str(base)) as engine:
        schema = build_app(engine).openapi()
    served = {f"{method.upper()} {path}" for path, item in schema["paths"].items() for method in item}
    assert named("Endpoints") == served


def test_endpoints_of_fine_tuning(base, tmp_path):
    with Engine(str(base)) as engine:
        plain = build_app(engine).openapi()["paths"]
        settings = FineTuning(folder=str(tmp_path))
        schema = build_app(engine, Access(fine_tuning=settings)).openapi()
    served = {
        f"{method.upper()} {path}" for path, item in schema["paths"].items() for method in item if path not in plain
    }
    assert named("Fine-tuning beside requests") == served
    fields = set(JobBody.model_fields) - {"integrations"}
    assert all(f"`{name}`" in TEXT.split("## Fine-tuning beside requests")[1].split("\n## ")[0] for name in fields)
    assert set(FineTuning.model_fields) == {"folder", "step_seconds", "adapter", "training"}


def test_options():
    limits = {f"limits.{name}" for name in Limits.model_fields}
    assert named("The server's own options") == (set(ServeSpec.model_fields) - {"limits"}) | limits


def test_metrics(engine):
    text = Metrics(engine).text().decode()
    kinds = dict(re.findall(r"^# TYPE (toolkit_\w+) (\w+)$", text, re.MULTILINE))
    assert named("Logs and metrics") == {name for name in kinds if not name.endswith("_created")}
