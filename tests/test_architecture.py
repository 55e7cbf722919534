"""The structure that the documents promise: who may import whom, and a table of methods that is the catalogue."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adapters import catalogue
from adapters.errors import InputError
from tests import update_families_table

ROOT = Path(__file__).parents[1]


def test_import_rule() -> None:
    command = shutil.which("lint-imports", path=str(Path(sys.executable).parent)) or shutil.which("lint-imports")
    if command is None:
        pytest.skip("import-linter is not installed: pip install 'adapter-studio[test]'")
    result = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_table_lists_the_catalogue() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    shown = text.split("<!-- methods -->")[1].split("<!-- /methods -->")[0].strip()
    assert shown == catalogue.markdown_table(catalogue.methods()), (
        "docs/methods.md is out of date: run  python -m tests.update_methods_table"
    )


def test_the_table_lists_the_families() -> None:
    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    shown = text.split(update_families_table.START)[1].split(update_families_table.END)[0]
    assert shown == update_families_table.table(), (
        "docs/families.md is out of date: run  python -m tests.update_families_table"
    )


@pytest.mark.parametrize("method", catalogue.methods(), ids=lambda method: f"{method.stage}-{method.name}")
def test_method_entries_lead_somewhere(method: catalogue.Method) -> None:
    assert callable(method.load())
    assert method.summary.endswith(".")
    assert method.title


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'composite'"):
        catalogue.find("compose", "compsite")
