"""The report of an audit: JSON, Markdown, HTML, JUnit, and one line per request; none with a word of any request."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from adapters import files

SCHEMA = 1
WORDS = {
    "pass": "Nothing beyond the limits was found.",
    "fail": "At least one limit is exceeded.",
    "inconclusive": "There is not enough to say yes or no.",
}
Table = tuple[str, list[str], list[list[str]]]
"""Title, columns, rows."""


def write(folder: Path, report: dict[str, Any], items: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Write every form of a report; returns their paths by form.

    Args:
        report: plain values; ``verdict``, ``checks`` and the rest as the job made them.
        items: one row per request and audit: id, category, outcomes and scores.
    """
    texts = {
        "json": ("audit.json", json.dumps({"schema": SCHEMA, **report}, indent=1, default=str)),
        "markdown": ("audit.md", markdown(report)),
        "html": ("audit.html", page(report)),
        "junit": ("junit.xml", junit(report)),
    }
    if items:
        texts["items"] = ("items.csv", _csv(items))
    return {form: str(files.write_text(folder / name, text)) for form, (name, text) in texts.items()}


def write_texts(place: Path, rows: Iterable[dict[str, str]]) -> Path:
    """Requests and answers as JSON lines that only their owner can read."""

    def content(part: Path) -> None:
        with part.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    return files.write(place, content, private=True)


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    parts = [f"# Safety audit of {report['adapter']['name']}", _summary(report)]
    for title, columns, rows in _tables(report):
        lines = ["| " + " | ".join(cells) + " |" for cells in [columns, ["---"] * len(columns), *rows]]
        parts += [f"## {title}", "\n".join(lines)]
    parts += ["\n".join(f"- {note}" for note in _notes(report))]
    return "\n\n".join(filter(None, parts)) + "\n"


def page(report: dict[str, Any]) -> str:
    """The report as one HTML file without scripts."""
    name = html.escape(report["adapter"]["name"])
    body = [f"<h1>Safety audit of {name}</h1>", f'<p class="{report["verdict"]}">{html.escape(_summary(report))}</p>']
    for title, columns, rows in _tables(report):
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in columns)
        lines = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        body.append(f"<h2>{html.escape(title)}</h2><table><tr>{head}</tr>{lines}</table>")
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in _notes(report))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Safety audit of {name}</title><style>{_STYLE}'
        f"</style><body>{''.join(body)}<ul>{notes}</ul></body></html>\n"
    )


_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b2330}"
    "table{border-collapse:collapse;font-size:.9rem}th,td{text-align:left;padding:.3rem .9rem .3rem 0;"
    "border-bottom:1px solid #d8dde5;vertical-align:top}.pass{color:#12703a}.fail{color:#a4161a}"
    ".inconclusive{color:#8a5a00}"
)


def junit(report: dict[str, Any]) -> str:
    """One test case per limit, for continuous integration."""
    checks = report["checks"]
    suite = ElementTree.Element(
        "testsuite", name="safety audit", tests=str(len(checks)),
        failures=str(sum(check["status"] == "fail" for check in checks)),
        skipped=str(sum(check["status"] == "inconclusive" for check in checks)),
    )  # fmt: skip
    for check in checks:
        case = ElementTree.SubElement(suite, "testcase", classname=report["adapter"]["name"], name=check["name"])
        tag = {"fail": "failure", "inconclusive": "skipped"}.get(check["status"])
        if tag:
            ElementTree.SubElement(case, tag, message=check["reason"])
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _summary(report: dict[str, Any]) -> str:
    adapter, base = report["adapter"]["name"], report["base"]["name"]
    return f"{report['verdict'].upper()}: '{adapter}' on '{base}'. {WORDS[report['verdict']]}"


def _tables(report: dict[str, Any]) -> list[Table]:
    found: list[Table] = []
    if report["checks"]:
        found.append(("Limits", ["", "verdict", "change in points", "95 % interval", "limit", "items", "why"],
                      [_check(check) for check in report["checks"]]))  # fmt: skip
    for judge in report.get("judges", ()):
        found.append((f"Answers by {judge['judge']}", ["", "base", "adapter"], _rates(judge["rates"])))
    if report.get("judges"):
        rows = [
            [row["category"], row["kind"], str(row["n"]), f"{100 * row['value']:+.1f}", f"{row['p_holm']:.2g}"]
            for row in report["judges"][0]["categories"]
        ]
        found.append(("Change of refusals by category", ["category", "kind", "items", "points", "p (Holm)"], rows))
    found += _screen_tables(report.get("screen") or {})
    return found


def _check(check: dict[str, Any]) -> list[str]:
    return [
        check["title"], check["status"], f"{check['value']:+.1f}", f"{check['low']:+.1f} to {check['high']:+.1f}",
        f"{check['limit']:g}", str(check["n"]), check["reason"],
    ]  # fmt: skip


def _rates(rates: dict[str, dict[str, float]]) -> list[list[str]]:
    rows = []
    for kind in ("harmful", "benign"):
        both = [rates.get(f"{model} {kind}", {}) for model in ("base", "adapter")]
        for outcome in sorted({*both[0], *both[1]}):
            rows.append([f"{kind}: {outcome}", *(f"{100 * one.get(outcome, 0.0):.1f} %" for one in both)])
    return rows


def _screen_tables(screen: dict[str, Any]) -> list[Table]:
    found: list[Table] = []
    modules = sorted(screen.get("modules", ()), key=lambda m: -(m["undo"] or m["relative"]))[:20]
    if modules:
        columns = ["module", "|D|/|W0|", "spectral", "stable rank", "undo u", "cosine", "inside", "Safe LoRA"]
        keys = ("relative", "spectral", "stable_rank", "undo", "cosine", "inside", "safe_lora")
        rows = [[m["name"], *("" if m[key] is None else f"{m[key]:.3g}" for key in keys)] for m in modules]
        found.append(("Weights: the modules that change most", columns, rows))
    if screen.get("gaps"):
        rows = [[str(g["layer"]), f"{g['ratio']:.0%}", f"{g['base_auc']:.2f}", f"{g['adapter_auc']:.2f}"]
                for g in screen["gaps"]]  # fmt: skip
        found.append(("Hidden states", ["layer", "distance kept", "AUC base", "AUC adapter"], rows))
    return found


def _notes(report: dict[str, Any]) -> list[str]:
    return [*(f"Warning: {text}" for text in report.get("warnings", ())), *report.get("remarks", ())]


def _csv(items: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(items[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(items)
    return text.getvalue()
