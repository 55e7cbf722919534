"""``studio audit``: does an adapter weaken refusals, refuse harmless requests, or cost ability?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from studio.audit.schema import AuditConfig
from studio.cli.output import Json, Output, Quiet, facts, table
from studio.cli.schema_options import with_options
from studio.training.commands import launch


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("audit")(with_options(AuditConfig, skip=["adapter"])(audit))


def audit(
    fields: dict[str, Any],
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="Language adapter: name in the library, file or PEFT folder.")
    ],
    limits: Annotated[
        Path | None,
        typer.Option("--limits", metavar="FILE.yaml", help="Limits as key: value; flags come first.",
                     rich_help_panel="Limits"),
    ] = None,
    detach: launch.Detach = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:  # fmt: skip
    """Compare an adapter's refusals and ability with its base's. Exit code 0 passes, 1 fails, 3 cannot tell."""
    from studio import jobs, silence
    from studio.schema import read_yaml

    output = Output(json, quiet)
    silence.library_warnings()
    kept = read_yaml(limits) if limits is not None else {}
    config = AuditConfig.parse({"adapter": adapter, **kept, **fields}, source="audit")
    if detach:
        launch.detach("audit", config, output)
        return 0
    done = launch.here(lambda terminal: jobs.run_here("audit", config, terminal), output)
    result = dict(done.result or {})
    output.result({"job": done.id, **result}, lambda: _shown(result))
    for text in (*result["warnings"], *result["remarks"]):
        output.note(f"Note: {text}")
    output.note(f"Report: {result['files']['html']}")
    last = result.get("mitigated", result)
    if "mitigated" in result:
        output.note(f"'{last['library']}' is in the library; its own report: {last['files']['html']}")
    return int(last["exit_code"])


def _shown(result: dict[str, Any]) -> Any:
    from rich.console import Group

    parts: list[Any] = []
    for title, one in (("", result), ("after mitigation", result.get("mitigated"))):
        if one is None:
            continue
        rows = [
            (check["title"], check["status"], f"{check['value']:+.1f}",
             f"{check['low']:+.1f} to {check['high']:+.1f}", f"{check['limit']:g}", check["n"])
            for check in one["checks"]
        ]  # fmt: skip
        if rows:
            parts.append(table([title, "verdict", "points", "95 % interval", "limit", "items"], rows))
        parts.append(facts([("verdict", one["verdict"])]))
    return Group(*parts)
