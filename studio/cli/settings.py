"""``studio settings``: show or change folders and other settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from studio.cli.output import Json, Output, Quiet, facts


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("settings", help="Show or change folders and other settings.")(settings)


def settings(
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; repeatable."),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show or change folders and other settings."""
    from studio import settings as store
    from studio.cli.schema_options import pair

    output = Output(json, quiet)
    if set_:
        changed = {**store.load().model_dump(mode="json"), **dict(pair("--set", text) for text in set_)}
        output.note(f"Written to {store.save(store.Settings.parse(changed, source='the settings'))}")
    values = _values()
    output.result(values, lambda: facts(values.items()))


def _values() -> dict[str, Any]:
    from studio import settings as store

    def shown(paths: list[Path]) -> list[str]:
        return [str(path) for path in paths]

    loaded = store.load().model_dump(mode="json")
    return {
        **loaded,
        "home": str(store.home()),
        "settings_file": str(store.settings_file()),
        "adapter_folders": shown(store.adapter_folders()),
        "base_folders": shown(store.base_folders()),
        "jobs": str(store.home() / "jobs"),
        "queue": loaded["queue_url"] or str(store.home() / "queue.db"),
    }
