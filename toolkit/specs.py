"""Specs: YAML files or dicts, read strictly into frozen models, with every error at its key path and line.

A spec may carry a `smoke:` block: overrides that make it small enough for a test. It is applied when
`smoke=True` and dropped otherwise.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError

from toolkit.errors import MissingError, Problem, SpecError
from toolkit.names import did_you_mean

Document = tuple[dict[str, Any], dict[str, int]]
"""The data of a YAML document, and the line of every key path in it."""


class Spec(BaseModel):
    """A frozen block of a spec; a key it does not declare is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=(), arbitrary_types_allowed=True
    )

    _name: str = PrivateAttr("spec")
    _lines: Mapping[str, int] = PrivateAttr(default_factory=dict)

    @classmethod
    def join(cls, documents: Sequence[Document]) -> Document:
        """Make one spec of a file that holds several documents; a class that knows what that means overrides it."""
        raise SpecError(f"holds {len(documents)} YAML documents; one was expected")

    def error(self, problems: Sequence[Problem]) -> SpecError:
        """Return the error for faults that were found after the spec was read, with their lines."""
        placed = [Problem(p.where, p.message, p.line or _line(p.where, self._lines)) for p in problems]
        return SpecError(placed, self._name)


def _as_list(value: Any) -> Any:
    return [str(value)] if isinstance(value, str | Path) else value


def _as_path(value: Any) -> Any:
    return os.path.expanduser(str(value)) if isinstance(value, str | Path) else value


def _as_source(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | list | Mapping):
        raise ValueError("expected a folder, a hub id, or an object in memory")
    return _as_path(value)


Files = Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]
"""One file, or a list of them."""

Folder = Annotated[str, BeforeValidator(_as_path)]
"""A path to a folder; a leading `~` is the user's home."""

FolderOrObject = Annotated[Any, BeforeValidator(_as_source)]
"""A folder or a hub id; or what would be loaded from there, in memory."""

Size = Annotated[int, BeforeValidator(lambda v: parse_bytes(v) if isinstance(v, str) else v), Field(ge=1)]
"""Bytes, as a number or a text such as `20MB`."""

T = TypeVar("T", bound=Spec)
Source = str | Path | Mapping[str, Any]
"""What a spec is read from: a YAML file or a dict."""

_KEY = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


def load(
    source: Source | T,
    model: type[T],
    *,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    smoke: bool = False,
) -> T:
    """Read a spec.

    Args:
        source: a YAML file, a dict, or an instance of `model`, which is returned as it is and cannot be changed.
        model: the class that describes the spec.
        overrides: `key.path=value` strings, the value in YAML; `models[0].weight=0.3` reaches into lists.
        options: values that take precedence over the spec's own, such as a command's options.
        smoke: apply the spec's own `smoke:` block.

    Raises:
        MissingError: no such file.
        SpecError: the text is not YAML, or the spec has errors, all of which are reported; or an instance is to be
            changed.
    """
    if isinstance(source, model):
        if overrides or options or smoke:
            raise SpecError(f"a {model.__name__} is final; give its file or a dict to change values or to run it small")
        return source
    if isinstance(source, Spec):
        raise SpecError(f"expected a {model.__name__}, a file or a dict, got a {type(source).__name__}")
    documents, name = _documents(source)
    try:
        data, lines = documents[0] if len(documents) == 1 else model.join(documents)
    except SpecError as error:
        raise SpecError(error.problems or str(error), name) from None
    small = data.pop("smoke", None)
    if smoke and small is not None:
        data = merged(data, small)
    data = merged(data, options or {})
    for override in overrides:
        _override(data, override)
    return validate(data, model, lines=lines, name=name)


def read(source: Source) -> tuple[dict[str, Any], dict[str, int], str]:
    """Return the data of a spec, the line of every key path, and the name to print in errors."""
    documents, name = _documents(source)
    if len(documents) > 1:
        raise SpecError(f"holds {len(documents)} YAML documents; one was expected", name)
    return *documents[0], name


def _documents(source: Source) -> tuple[list[Document], str]:
    if isinstance(source, Mapping):
        return [(_copied(source), {})], "spec"
    if not isinstance(source, str | Path):
        raise SpecError(f"a spec is a YAML file or a dict, not a {type(source).__name__}")
    path = Path(os.path.expanduser(source))
    if not path.is_file():
        raise MissingError(f"{path}: no such spec file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise SpecError("not UTF-8 text", str(path)) from None
    except OSError as error:
        raise SpecError(f"cannot be read ({error.strerror})", str(path)) from None
    return _parse(text, str(path)), str(path)


def _copied(value: Any) -> Any:
    """Copy the containers of a spec; what they hold, such as a model in memory, stays the same object."""
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def validate(data: Any, model: type[T], *, lines: Mapping[str, int] | None = None, name: str = "spec") -> T:
    """Check `data` against `model`, raising one `SpecError` that holds every problem."""
    try:
        spec = model.model_validate(data)
    except ValidationError as error:
        raise SpecError(problems(error, data, model, lines or {}), name) from None
    spec._name, spec._lines = name, lines or {}
    return spec


def problems(
    error: ValidationError, data: Any, model: type[Spec], lines: Mapping[str, int], prefix: str = ""
) -> list[Problem]:
    """Turn pydantic's errors into problems at key paths of the spec."""
    found: list[Problem] = []
    for item in error.errors(include_url=False):
        trail = _trail(item["loc"], data)
        where = prefix + path_text(trail)
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            key = str(trail[-1])
            known = _fields_at(model, trail[:-1]) | _fields_at(model, item["loc"][:-1])
            message = f"unknown key {key!r}{did_you_mean(key, known)}"
            if known and "did you mean" not in message:
                message += f" (known: {', '.join(sorted(known))})"
        elif item["type"] == "missing":
            message = "required key is missing"
        elif not isinstance(item["input"], Mapping | list):
            message += f", got {item['input']!r}"
        problem = Problem(where, message, _line(where, lines))
        if problem not in found:
            found.append(problem)
    return sorted(found, key=lambda problem: problem.line or 0)


def parse_bytes(text: str) -> int:
    """Read a size such as `20MB`, in powers of 1000.

    Raises:
        ValueError: it is none, or is zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise ValueError("not a size such as 20MB")
    return size


def path_text(trail: Sequence[str | int]) -> str:
    """Write a key path the way errors and overrides spell it: `models[0].parameters.weight`."""
    text = ""
    for part in trail:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def merged(base: Any, over: Any) -> Any:
    """Merge `over` into `base`: dicts key by key, anything else replaced."""
    if isinstance(base, Mapping) and isinstance(over, Mapping):
        result = dict(base)
        for key, value in over.items():
            result[key] = merged(base[key], value) if key in base else value
        return result
    return over


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-3` as a number and a date as text, as YAML 1.2 does."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse(text: str, name: str) -> list[Document]:
    found: list[Document] = []
    duplicates: list[Problem] = []
    try:
        loader = _Loader(text)
        while loader.check_node() or not found:
            lines: dict[str, int] = {}
            node = loader.get_node()
            if node is not None:
                _walk(node, (), lines, duplicates)
            data = None if node is None else loader.construct_document(node)
            if duplicates:
                raise SpecError(duplicates, name)
            if not isinstance(data, dict):
                given = "an empty file" if data is None else f"a {type(data).__name__}"
                raise SpecError(f"expected keys and values at the top level, got {given}", name)
            found.append((data, lines))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise SpecError(f"not valid YAML: {place}{error.problem}", name) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a value that is not what its tag says
        raise SpecError(f"not valid YAML: {' '.join(str(error).split())}", name) from None
    except RecursionError:
        raise SpecError("not usable YAML: nested too deeply, or within itself", name) from None
    return found


def _walk(node: yaml.Node, trail: tuple[str | int, ...], lines: dict[str, int], twice: list[Problem]) -> None:
    lines.setdefault(path_text(trail), node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # the constructor says what is wrong with it
            here = (*trail, str(key.value))
            if key.value in seen and key.value != "<<":
                twice.append(Problem(path_text(here), "key given twice", key.start_mark.line + 1))
            seen.add(key.value)
            lines[path_text(here)] = key.start_mark.line + 1
            _walk(value, here, lines, twice)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _walk(value, (*trail, index), lines, twice)


def _override(data: dict[str, Any], text: str) -> None:
    path, sep, value = text.partition("=")
    trail = [name or int(index) for name, index in _KEY.findall(path)]
    if not sep or not path or path_text(trail) != path:
        raise SpecError(f"override {text!r} is not of the form key.path=value")
    here: Any = data
    for depth, part in enumerate(trail[:-1]):
        if isinstance(here, dict) and isinstance(part, str):
            here = here.setdefault(part, {})
        elif isinstance(here, list | tuple) and isinstance(part, int) and part < len(here):
            here = here[part]
        else:
            raise SpecError(f"override {text!r}: {path_text(trail[: depth + 1])} is not in the spec")
    last = trail[-1]
    try:
        parsed = yaml.load(value, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise SpecError(f"override {text!r}: the value is not valid YAML") from None
    if isinstance(here, dict) and isinstance(last, str):  # noqa: SIM114 - as in `_trail`
        here[last] = parsed
    elif isinstance(here, list) and isinstance(last, int) and last < len(here):
        here[last] = parsed
    else:
        raise SpecError(f"override {text!r}: {path} is not in the spec")


def _trail(loc: Sequence[str | int], data: Any) -> list[str | int]:
    """Keep of a pydantic location what is a key of the data; union branches are named there as well."""
    trail: list[str | int] = []
    here = data
    for position, part in enumerate(loc):
        if isinstance(here, Mapping) and part in here:  # noqa: SIM114 - two conditions too long for one line
            here = here[part]
        elif isinstance(here, list | tuple) and isinstance(part, int) and part < len(here):
            here = here[part]
        elif position < len(loc) - 1 or not isinstance(here, Mapping):
            continue
        trail.append(part)
    return trail


def _line(where: str, lines: Mapping[str, int]) -> int | None:
    while where and where not in lines:
        where = where[: max(where.rfind("."), where.rfind("["), 0)]
    return lines.get(where) if where else None


def _fields_at(model: type[Spec], trail: Sequence[str | int]) -> set[str]:
    """Name the keys that the block at `trail` may have, over every branch of unions on the way."""
    kinds: list[Any] = [model]
    for part in trail:
        kinds = [inner for kind in kinds for inner in _inside(kind, part)]
    models = [kind for outer in kinds for kind in _arms(outer) if _is_spec(kind)]
    return {field.alias or name for kind in models for name, field in kind.model_fields.items()}


def _inside(kind: Any, part: str | int) -> list[Any]:
    found: list[Any] = []
    for arm in _arms(kind):
        if _is_spec(arm) and isinstance(part, str):
            found += [f.annotation for n, f in arm.model_fields.items() if part in (n, f.alias)]
        elif get_origin(arm) in (list, tuple, Sequence) and isinstance(part, int):
            found += [a for a in get_args(arm) if a is not Ellipsis]
        elif get_origin(arm) in (dict, Mapping) and isinstance(part, str):
            found.append(get_args(arm)[1])
    return found


def _arms(kind: Any) -> list[Any]:
    if get_origin(kind) is Annotated:
        return _arms(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [arm for inner in get_args(kind) for arm in _arms(inner)]
    return [kind]


def _is_spec(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Spec)
