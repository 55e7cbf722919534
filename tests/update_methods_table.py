"""Write the catalogue's table into ``docs/methods.md``: ``python -m tests.update_methods_table``."""

from __future__ import annotations

from pathlib import Path

from adapters import catalogue

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"


def main() -> None:
    before, rest = PAGE.read_text(encoding="utf-8").split("<!-- methods -->")
    after = rest.split("<!-- /methods -->")[1]
    table = catalogue.markdown_table(catalogue.methods())
    text = f"{before}<!-- methods -->\n{table}\n<!-- /methods -->{after}"
    temporary = PAGE.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(PAGE)


if __name__ == "__main__":
    main()
