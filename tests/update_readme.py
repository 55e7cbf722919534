"""Write the catalogue's table into the README: ``python -m tests.update_readme``."""

from __future__ import annotations

from pathlib import Path

from adapters import catalogue

README = Path(__file__).parents[1] / "README.md"


def main() -> None:
    before, rest = README.read_text(encoding="utf-8").split("<!-- methods -->")
    after = rest.split("<!-- /methods -->")[1]
    table = catalogue.markdown_table(catalogue.methods())
    text = f"{before}<!-- methods -->\n{table}\n<!-- /methods -->{after}"
    temporary = README.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(README)


if __name__ == "__main__":
    main()
