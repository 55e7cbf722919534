"""The clients of a federation: names, data, and the training each of them runs.

Rows of one data file are divided into a file for each simulated client in the run's folder; a real client keeps its
own file or folder. Nothing here loads torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters import catalogue, files
from adapters.errors import InputError
from studio.datasets.seeds import derive, rng
from studio.datasets.texts import Row, scan, usable_rows
from studio.federation import partition
from studio.federation.schema import ClientFields, FederateConfig
from studio.jobs import kinds
from studio.schema import JobConfig

QUIET: dict[str, Any] = {
    "sample_prompts": [], "sample_every": 0, "sample_at_start": False, "save_every": 0, "checkpoint_every": 0,
    "save_dtype": "fp32", "tracker": "none",
}  # fmt: skip
"""Settings of a client's training in a round: nothing is drawn, answered or saved on the way."""

REFUSED: dict[str, tuple[Any, str]] = {
    "init": ("default", "the server sends the factors a round begins with"),
    "freeze_a": (False, "choose method ffa-lora instead"),
    "method": ("lora", "the server combines LoRAs"),
    "s2_share": (None, "the server combines a pair of every layer, not one that layers share"),
    "adalora_rank": (0, "ranks would differ after every round"),
    "l4q_bits": (0, "the server does not combine roundings"),
    "use_dora": (False, "the server combines A and B, not magnitudes"),
    "ema": (False, "a round's average would not be what was trained"),
    "validation_split": (0.0, "other rows would be held out every round: name a test file of each client instead"),
    "train_text_encoder": (False, "federated trainings adapt the denoiser only"),
}
"""Keys of the training with the one value a federation takes, and why."""


@dataclass(frozen=True)
class Member:
    """One client, ready to train.

    Attributes:
        number: from 0, for seeds.
        training: name of the kind of training.
        settings: of the training, without what the round decides.
        test: what the shared adapter is measured on; empty for nothing.
    """

    name: str
    number: int
    training: str
    settings: dict[str, Any]
    data: str
    test: str = ""

    def config(self, seed: int, quiet: bool = True, name: str = "", measured: bool = False) -> Any:
        """The training's configuration for one call.

        Args:
            quiet: leave out samples and checkpoints.
            name: of the adapter it writes.
            measured: measure on the test data.

        Raises:
            InputError: a setting that the training does not have or take.
        """
        kind = kinds.trainings()[self.training]
        known = kind.model().model_fields
        values = {**self.settings, "data": self.data, "name": name or "round", "seed": seed}
        if quiet:
            values |= {key: value for key, value in QUIET.items() if key in known}
        if measured and self.test:
            values["validation_data"] = self.test
        return kind.parse(values)

    def seed(self, seed: int, number: int) -> int:
        """Of round ``number``: another order of the data in every round and client."""
        return derive(seed, f"client {self.number}", number) % 2**31


def members(config: FederateConfig, folder: Path) -> list[Member]:
    """All clients; files of simulated ones are written below ``folder``.

    Raises:
        InputError: data that cannot be read or divided, a client without data, settings that cannot be federated.
    """
    fields = config.clients or simulated(config, folder)
    kind = kinds.trainings()[config.train]
    _check_settings(config, kind.model())
    made = []
    for number, client in enumerate(fields):
        settings = dict(config.training) | ({"rank": client.rank} if client.rank else {})
        member = Member(client.name, number, config.train, settings, client.data, client.test)
        if client.test and "validation_data" not in kind.model().model_fields:
            raise InputError(
                f"A training '{config.train}' is not measured on test data: leave out test of '{client.name}'."
            )
        made.append(member)
    return made


def check(config: FederateConfig) -> None:
    """Refuse a federation that is known to fail, before its job is made.

    Raises:
        InputError: as :func:`members`, or what a client's training refuses (the client is named).
    """
    from tempfile import TemporaryDirectory

    from studio.federation import private

    refuse_secure_aggregation(config)
    if config.privacy != "none":
        private.check_installed()
    with TemporaryDirectory() as place:
        for member in members(config, Path(place)):
            asked: JobConfig = member.config(0, measured=True)
            try:
                kinds.trainings()[config.train].check(asked)
            except InputError as error:
                raise InputError(f"client '{member.name}': {error}") from None
            private.check(config, asked)


def refuse_secure_aggregation(config: FederateConfig) -> None:
    """Raise :class:`InputError` for a run in one process that is to hide from itself what its clients send."""
    if config.secure_aggregation:
        raise InputError(
            "secure_aggregation cannot be had in one process, which sees what every client sends: switch it off."
        )


def _check_settings(config: FederateConfig, schema: type[JobConfig]) -> None:
    for key, (allowed, why) in REFUSED.items():
        if key in schema.model_fields and config.training.get(key, allowed) != allowed:
            raise InputError(f"training: '{key}' cannot be {config.training[key]!r} in a federation: {why}.")


# ------------------------------------------------------------------------------------------------ simulated clients


def simulated(config: FederateConfig, folder: Path) -> list[ClientFields]:
    """The rows of ``config.data`` divided into a file, and a test file, for each client."""
    rows = usable_rows(scan(config.data)).rows
    names, parts = divided(config, rows)
    place = folder / "data"
    made = []
    for name, (shown, tested) in zip(names, with_tests(config, rows, names, parts), strict=True):
        made.append(ClientFields(
            name=name, data=str(_write(place / f"{name}.jsonl", config, rows, shown)),
            test=str(_write(place / f"{name}-test.jsonl", config, rows, tested)) if tested else "", rank=None,
        ))  # fmt: skip
    return made


def divided(config: FederateConfig, rows: Sequence[Row]) -> tuple[list[str], list[list[int]]]:
    """Names of the clients, and the numbers of their rows (in ``rows``, before test rows are taken away)."""
    random = rng(config.seed, "partition")
    if config.partition == "even":
        parts = partition.even(len(rows), config.count, random)
        return _numbered(config.count), parts
    values = column(rows, config.by, config.data)
    if config.partition == "column":
        found = partition.by_value(values)
        return [_file_name(name) for name in found], list(found.values())
    if config.partition == "dirichlet":
        return _numbered(config.count), partition.dirichlet(values, config.count, config.concentration, random)
    return _numbered(config.count), partition.mostly(
        values, config.count, partition.MOSTLY[config.partition], random
    )


def with_tests(
    config: FederateConfig, rows: Sequence[Row], names: Sequence[str], parts: Sequence[Sequence[int]]
) -> list[tuple[list[int], list[int]]]:
    """Of each client, its rows to train on and to measure on."""
    partition.check(names, parts)
    if config.test_by:
        groups = column(rows, config.test_by, config.data)
        kept = partition.held_out_groups(groups, config.test_share, rng(config.seed, "test"))
        found = [([n for n in part if groups[n] not in kept], [n for n in part if groups[n] in kept]) for part in parts]
    else:
        found = [
            partition.held_out(part, config.test_share, rng(config.seed, "test", number))
            for number, part in enumerate(parts)
        ]
    partition.check(names, [shown for shown, _ in found])
    return found


def column(rows: Sequence[Row], name: str, source: str) -> list[str]:
    """The values of a column; raises :class:`InputError` if a row has none."""
    missing = [row.number for row in rows if row.values.get(name) in (None, "")]
    if missing:
        columns = ", ".join(dict.fromkeys(key for row in rows for key in row.values))
        raise InputError(f"'{source}' has no '{name}' in row {missing[0]}: its columns are {columns}.")
    return [str(row.values[name]) for row in rows]


def _numbered(count: int) -> list[str]:
    return [f"client-{number + 1}" for number in range(count)]


def _file_name(text: str) -> str:
    name = "".join(letter if letter.isalnum() or letter in "_.+-" else "-" for letter in text).lstrip(".+-")
    return name or "client"


def _write(target: Path, config: FederateConfig, rows: Sequence[Row], numbers: Sequence[int]) -> Path:
    """Rows as a file; relative paths of pictures are made absolute, since the file lies elsewhere."""
    home = Path(config.data).expanduser().resolve().parent
    lines = []
    for number in numbers:
        values = dict(rows[number].values)
        if isinstance(picture := values.get("image"), str) and (home / picture).is_file():
            values["image"] = str(home / picture)
        lines.append(json.dumps(values, ensure_ascii=False, default=str))
    return files.write_text(target, "\n".join(lines) + "\n")


def rule_of(config: FederateConfig) -> Any:
    """The entry of the server's rule in the catalogue."""
    return catalogue.find("federated", config.method)
