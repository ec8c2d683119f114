"""The pages of the documentation's site that are made from the code: hooks of MkDocs, see mkdocs.yml.

A page for every command, from its options; for every spec, from its model; for every method, from its file: what it
computes, where it comes from, its parameters, and when to take it (`when.yaml`). Links that leave `docs` become links
to pages where the site has them, and plain text where it has not.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

GROUPS = {
    "merge": ("Merge methods", "toolkit.merge.methods", "merge_method: {name}"),
    "learned": ("Learned merges", "toolkit.merge.learned", "method: {name}"),
    "adapters": ("Adapters beyond PEFT", "toolkit.adapters.methods", "adapter: {{method: {name}}}"),
    "training": ("Ways to train", "toolkit.adapters.training", "training: {{methods: {{method: {name}}}}}"),
    "routers": ("Routers", "toolkit.routing.routers", "router: {name}"),
    "token_routers": ("Token routers", "toolkit.routing.token.routers", "router: {name}"),
    "fusion": ("Logit fusion", "toolkit.routing.fusion.methods", "method: {name}"),
}
"""Folder of the pages -> its title, the package with a file per method, and how a spec names one."""

SPECS = {
    "merge": "toolkit.merge.spec:MergeSpec",
    "train": "toolkit.adapters.spec:TrainSpec",
    "serve": "toolkit.serving.spec:ServeSpec",
    "evaluate": "toolkit.evaluation.spec:EvaluateSpec",
    "route-fit": "toolkit.routing.spec:RouteSpec",
    "route-evaluate": "toolkit.routing.spec:RouteEvaluateSpec",
    "route-compare": "toolkit.routing.spec:CompareSpec",
    "route-calibrate": "toolkit.routing.spec:CalibrateSpec",
    "route-gates": "toolkit.routing.token.spec:GatesSpec",
    "route-fuse": "toolkit.routing.fusion.spec:FusionSpec",
    "learn": "toolkit.merge.learning.spec:LearnSpec",
    "search": "toolkit.jobs.search.spec:SearchSpec",
    "extract": "toolkit.merge.extract:ExtractSpec",
    "moe": "toolkit.merge.moe.spec:MoeSpec",
    "compose": "toolkit.adapters.compose.run:ComposeSpec",
    "transfer": "toolkit.adapters.transfer.spec:TransferSpec",
    "bench-serve": "toolkit.jobs.bench_serve.spec:BenchSpec",
    "run": "toolkit.jobs.recipe:RecipeSpec",
    "skills": "toolkit.jobs.skills:SkillsSpec",
}
"""Pages of specs -> the model of each."""

BROUGHT = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"} | {
    f"{folder}/README.md": f"{folder.replace('/', '_')}.md"
    for folder in ("recipes", "benchmarks", "recipes/reproduce/eight_tasks")
}
"""Pages of the repository that the site shows too."""


def on_config(config: Any) -> Any:
    """Put the pages in order."""
    guides = [
        "tutorial",
        "merging",
        "learning",
        "training",
        "adapters",
        "routing",
        "serving",
        "web",
        "bench_serve",
        "kernels",
    ]
    inside = ["architecture", "extending", "adding_an_adapter", "embedded_base"]
    made = sorted(pages())
    nav: list[Any] = ["index.md", {"Guides": [f"{name}.md" for name in guides]}]
    nav.append({"Reference": [{title: [p for p in made if p.startswith(f"{f}/")]} for f, title in _FOLDERS.items()]})
    groups = [
        {title: [f"methods/{group}/index.md", *(f"methods/{group}/{n}.md" for n in methods(group))]}
        for group, (title, *_) in GROUPS.items()
    ]
    nav.append({"Methods": groups})
    nav.append({"About": ["readme.md", "migrating.md", "footguns.md", "scaling.md", "benchmarks.md", "changelog.md"]})
    rest = sorted(set(BROUGHT.values()) - {"readme.md", "benchmarks.md", "changelog.md"})
    nav.append({"Inside": [*(f"{name}.md" for name in inside), *rest]})
    config.nav = nav
    return config


_FOLDERS = {"commands": "Commands", "specs": "Specs"}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links that leave the folder of the documents to pages, or to nothing."""
    return relinked(markdown, page.file.src_uri)


def relinked(markdown: str, where: str) -> str:
    """Return a page's text with links that the site has.

    Args:
        markdown: the text.
        where: place of the page among the documents.
    """
    origin = {page: source for source, page in BROUGHT.items()}.get(where)
    folder = (ROOT / origin).parent if origin else (ROOT / "docs" / where).parent

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        place = (folder / target).resolve()
        if place.is_dir():
            place /= "README.md"
        if not place.is_relative_to(ROOT):
            return match[0]
        inside = str(place.relative_to(ROOT))
        if inside in BROUGHT:
            return f"[{text}]({_up(where)}{BROUGHT[inside]}{anchor})"
        if inside.startswith("docs/"):
            return f"[{text}]({_up(where)}{inside.removeprefix('docs/')}{anchor})"
        return text if text.startswith("`") or text == inside else f"{text} (`{inside}`)"

    return re.sub(r"\[([^\]]+)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)", link, markdown)


def _up(where: str) -> str:
    return "../" * where.count("/")


@cache
def pages() -> Mapping[str, str]:
    """Return all pages that are made, by their places."""
    found = {page: (ROOT / source).read_text(encoding="utf-8") for source, page in BROUGHT.items()}
    found |= {f"commands/{name.replace(' ', '-')}.md": text for name, text in _commands()}
    found |= {f"specs/{name}.md": _spec_page(name, place) for name, place in SPECS.items()}
    when = yaml.safe_load((ROOT / "tools" / "when.yaml").read_text(encoding="utf-8"))
    for group in GROUPS:
        names = methods(group)
        found |= {f"methods/{group}/{name}.md": _method_page(group, name, when[group][name]) for name in names}
        found[f"methods/{group}/index.md"] = _group_page(group, names, when[group])
    return found


def methods(group: str) -> list[str]:
    """Return the names of a group's methods."""
    from toolkit.names import available

    return list(available(GROUPS[group][1]))


def _group_page(group: str, names: list[str], when: Mapping[str, str]) -> str:
    lines = [f"# {GROUPS[group][0]}\n", "| method | what it does | when |", "| --- | --- | --- |"]
    for name in names:
        first = document(group, name).split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
        lines.append(f"| [`{name}`]({name}.md) | {first} | {when[name]} |")
    return "\n".join(lines) + "\n"


def document(group: str, name: str) -> str:
    """Return what a method's file says of it."""
    path = ROOT.joinpath(*GROUPS[group][1].split("."), f"{name}.py")
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def _method_page(group: str, name: str, when: str) -> str:
    title, package, example = GROUPS[group]
    module = importlib.import_module(f"{package}.{name}")
    parts = [f"# {name}\n\n{_linked(document(group, name))}\n", f"## When to take it\n\n{when}\n"]
    parts.append(f"## In a spec\n\n```yaml\n{example.format(name=name)}\n```\n")
    model = _parameters(module)
    if model is not None and (rows := list(_fields(model))):
        parts.append("## Parameters\n\n" + _table(rows))
    return "\n".join(parts) + f"\nOne of the [{title.lower()}](index.md).\n"


def _linked(text: str) -> str:
    """Make links of papers' numbers."""
    text = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
    return re.sub(r"(?<![\d.:/\w])(\d{4}\.\d{5})(?!\d|\))", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def _parameters(module: Any) -> Any:
    """Return the class of a method's parameters: a model, or a dataclass of PEFT's."""
    for name in ("Params", "Parameters", "Config"):
        if hasattr(module, name):
            return getattr(module, name)
    own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    configs = [c for c in own if c.__name__.endswith("Config") or issubclass(c, BaseModel)]
    return configs[0] if configs else None


def _fields(model: Any) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, type, default and description of every field."""
    told = _attributes(model)
    if issubclass(model, BaseModel):
        for name, field in model.model_fields.items():
            default = field.get_default(call_default_factory=False)
            shown = "required" if field.is_required() else _shown(default, field.default_factory)
            yield field.alias or name, _type(field.annotation), shown, told.get(name, "")
        return
    inherited = set(getattr(importlib.import_module("peft").PeftConfig, "__dataclass_fields__", ()))
    for name, field in getattr(model, "__dataclass_fields__", {}).items():
        if name not in inherited:
            default = None if type(field.default).__name__ == "_MISSING_TYPE" else field.default
            told_here = told.get(name) or str(field.metadata.get("help", ""))
            yield name, _type(field.type), _shown(default, None), told_here


def _shown(default: Any, factory: Any) -> str:
    if default is PydanticUndefined or default is None:
        return "" if factory is None else _shown(factory(), None)
    if isinstance(default, BaseModel):
        return ""
    return f"`{default!r}`" if not isinstance(default, str) else f"`{default}`"


def _type(annotation: Any) -> str:
    """Return a type for a reader."""
    if isinstance(annotation, str):
        return annotation.replace("|", "or")
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(inner[0])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(t) for t in inner if t is not type(None)))
    if origin in (tuple, list, set, frozenset) or (origin is not None and issubclass(origin, typing.Sequence | set)):
        return f"list of {_type(inner[0])}" if inner else "list"
    if origin is not None:
        return "mapping" + (f" of {_type(inner[-1])}" if inner else "")
    return {"NoneType": "nothing", "Any": "any"}.get(annotation.__name__, annotation.__name__)


def _attributes(model: Any) -> dict[str, str]:
    """Return the descriptions in the `Attributes:` of a class and of those that it is made from."""
    found: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        text = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2]
        for match in re.finditer(r"^    (\w+): (.*(?:\n {8,}.*)*)", text, re.MULTILINE):
            found[match[1]] = " ".join(match[2].split())
    return found


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    lines = ["| key | type | default | |", "| --- | --- | --- | --- |"]
    cells = [[f"`{name}`", *(cell.replace("|", "\\|") for cell in rest)] for name, *rest in rows]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells)]) + "\n"


def _spec_page(name: str, place: str) -> str:
    """Return a page on a spec and on the specs inside of it."""
    module, _, kind = place.partition(":")
    model = getattr(importlib.import_module(module), kind)
    parts, seen, waiting = [f"# Spec of `toolkit {name.replace('-', ' ', name != 'bench-serve')}`\n"], set(), [model]
    while waiting:
        own = waiting.pop(0)
        if own in seen:
            continue
        seen.add(own)
        summary = inspect.cleandoc(own.__doc__ or "").partition("Attributes:")[0].strip()
        heading = "" if own is model else f"## {own.__name__}\n\n"
        parts.append(f"{heading}{summary}\n\n{_table(list(_fields(own)))}")
        waiting += [inner for field in own.model_fields.values() for inner in _models(field.annotation)]
    return "\n".join(parts)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models(inner)


def _commands() -> Iterator[tuple[str, str]]:
    """Yield the name and the page of every command."""
    import typer

    from toolkit.cli import COMMANDS, _app

    root: Any = typer.main.get_command(_app(COMMANDS))
    for name, command in root.commands.items():
        for words, one in _inner(f"toolkit {name}", command):
            yield words.removeprefix("toolkit "), _command_page(words, one)


def _inner(words: str, command: Any) -> Iterator[tuple[str, Any]]:
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from _inner(f"{words} {name}", inner)
    else:
        yield words, command


def _command_page(words: str, command: Any) -> str:
    rows = []
    for option in command.params:
        if option.hidden:
            continue
        names = str(option.name).upper() if option.param_type_name == "argument" else ", ".join(option.opts)
        kind = "" if getattr(option, "is_flag", False) else _type(option.type_descriptor.annotation)
        default = "" if option.default in (None, False, [], ()) or callable(option.default) else f"`{option.default}`"
        rows.append((names, kind, "required" if option.required else default, option.help or ""))
    return f"# {words}\n\n{command.help or ''}\n\n{_table(rows)}"
