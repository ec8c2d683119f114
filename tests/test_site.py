"""The documentation's site: it builds, its links lead somewhere, and every method has a page that says what it must."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

pytest.importorskip("mkdocs", reason="needs mkdocs-material, of the extra docs")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def made() -> Any:
    spec = importlib.util.spec_from_file_location("pages", ROOT / "tools" / "pages.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Links(HTMLParser):
    """Where a page leads, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := given.get(name))}
        self.links |= {value for name in ("href", "src") if (value := given.get(name)) is not None}


def test_site_builds_and_its_links_lead_somewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    pages = {
        path: Links(path.read_text(encoding="utf-8")) for path in tmp_path.rglob("*.html") if path.name != "404.html"
    }
    assert len(pages) > 130
    broken = []
    for path, page in pages.items():
        for link in page.links:
            target, _, anchor = unquote(link).partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            place = (path.parent / target).resolve() if target else path
            place = place / "index.html" if place.is_dir() else place
            if not place.exists() or (anchor and place in pages and anchor not in pages[place].anchors):
                broken.append(f"{path.relative_to(tmp_path)}: {link}")
    assert not broken


def test_nothing_is_fetched_from_elsewhere(tmp_path, made):
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in text
    assert "http" not in text


def test_every_method_has_a_page_that_says_what_it_computes_and_when_to_take_it(made):
    pages = made.pages()
    for group in made.GROUPS:
        for name in made.methods(group):
            page = pages[f"methods/{group}/{name}.md"]
            assert len(page.partition("## When to take it")[0]) > 100, name
            assert len(page.partition("## When to take it\n\n")[2].partition("\n")[0]) > 20, name


def test_when_to_take_is_told_of_every_method_and_of_nothing_else(made):
    import yaml

    told = yaml.safe_load((ROOT / "tools" / "when.yaml").read_text(encoding="utf-8"))
    assert {group: sorted(names) for group, names in told.items()} == {g: sorted(made.methods(g)) for g in made.GROUPS}


def test_every_key_of_a_spec_is_described(made):
    pages = [text for place, text in made.pages().items() if place.startswith("specs/")]
    bare = [row for text in pages for row in re.findall(r"^\| `\w+` \|.*\|  \|$", text, re.MULTILINE)]
    assert not bare


def test_every_command_and_option_is_there(made):
    from toolkit.cli import COMMANDS

    pages = made.pages()
    single = [name for name in COMMANDS if name not in ("route", "adapters")]
    assert all(f"commands/{name}.md" in pages for name in single)
    assert "--dry-run" in pages["commands/merge.md"]
    assert "commands/route-fit.md" in pages


def test_tutorial_runs_from_its_first_line_to_its_last(tmp_path, monkeypatch):
    """In order, in an empty folder, with fewer steps and rows."""
    from tests.test_docs import _words, check_server
    from toolkit.cli import main

    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    for long, short in (
        ('"max_steps": 115', '"max_steps": 2'),
        ("--train 3000", "--train 60"),
        ('"limit": 20', '"limit": 1'),
    ):
        assert long in text
        text = text.replace(long, short)
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 9
    for language, block in blocks:
        if language == "python":
            exec(compile(block, "tutorial.md", "exec"), {})
            continue
        for line in block.splitlines():
            if line.startswith("toolkit serve"):
                check_server(_words(line))
            elif line.startswith("toolkit"):
                assert main(_words(line)) == 0
            else:
                assert line.startswith("pip install")
