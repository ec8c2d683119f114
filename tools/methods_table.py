"""Write the table of merge methods into docs/merging.md, from the methods' own files.

python tools/methods_table.py
"""

from __future__ import annotations

import importlib
from pathlib import Path

from toolkit.merge.method import METHODS, load_method
from toolkit.names import available
from toolkit.tables import Table

DOCUMENT = Path(__file__).parent.parent / "docs" / "merging.md"
BEGIN, END = "<!-- methods -->\n", "<!-- end of methods -->"


def table() -> str:
    """Return one row per method: what it does, what it takes, its parameters."""
    rows = []
    for name in available(METHODS):
        method = load_method(name)
        low, high = method.models
        models = str(low) if low == high else f"{low} to {high}" if high else f"{low} or more"
        what = (importlib.import_module(f"{METHODS}.{name}").__doc__ or "").split("\n\n")[0]
        what = " ".join(what.split()).replace("|", "\\|")
        per_model = [f"`{key}`\\*" for key in sorted(method.per_model)]
        shared = [f"`{key}`" for key in sorted(method.shared)]
        rows.append([f"`{name}`", what, method.takes, models, ", ".join(per_model + shared)])
    return Table(("method", "what it does", "takes", "models", "parameters"), rows).to_markdown() + "\n"


def written(text: str) -> str:
    """Return the document with a fresh table."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}{table()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
