"""Tables as plain text: every cell whole, columns aligned, numbers to the right."""

from __future__ import annotations

from toolkit.tables import Table


def test_text():
    table = Table(("name", "value"), [["a", 1.25], ["a longer name", 1234.5], ["none", None]], "Title")
    assert table.to_text().splitlines() == [
        "Title",
        "name             value",
        "-------------  -------",
        "a                  1.2",
        "a longer name  1,234.5",
        "none                 -",
    ]


def test_a_table_without_rows_or_title_is_its_header():
    assert Table(("one", "two"), []).to_text() == "one  two\n---  ---"
