"""Write the families' table into ``docs/families.md``: ``python -m tests.update_families_table``."""

from __future__ import annotations

from pathlib import Path

from pipelines.diffusion.families import FAMILIES
from studio.library import base_families

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
START, END = "<!-- families -->\n", "\n<!-- /families -->"


def table() -> str:
    """A row per family."""
    rows = [
        "| family | name | opened from | regions | other pipelines | licence | checked on |",
        "|---|---|---|---|---|---|---|",
    ]
    for family in FAMILIES.values():
        opened = "hub id, directory" + (", single file" if family.single_file else "")
        others = ", ".join(family.other_pipelines) or "none"
        regions = ", ".join(base_families.regional_methods(family)) or "none"
        cells = family.title, f"`{family.name}`", opened, regions, others, family.licence, family.checked
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    text = f"{before}{START}{table()}{END}{rest.split(END)[1]}"
    temporary = PAGE.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(PAGE)


if __name__ == "__main__":
    main()
