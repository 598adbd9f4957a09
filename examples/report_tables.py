"""Tables in a page that is written by hand, between markers with their names: shared by the reports of the reproductions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def put_between_markers(path: Path, tables: Mapping[str, Sequence[str]]) -> None:
    """Print each table, and put its lines where ``<!-- name -->`` and ``<!-- end -->`` stand; a new page has markers alone."""
    text = path.read_text() if path.exists() else "\n".join(f"<!-- {name} -->\n<!-- end -->\n" for name in tables)
    for name, lines in tables.items():
        print("\n".join([*lines, ""]))
        before, _, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        text = before + f"<!-- {name} -->\n" + "\n".join(lines) + "\n" + end + after
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
