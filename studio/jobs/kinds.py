"""Kinds of jobs: a name, the schema of its configuration and the function that runs it.

Schema and function are named as text (``"module:attribute"``) so that the list can be read without importing torch.
A kind of training is declared in its module of :mod:`studio.training.tasks`, as ``KIND = Kind(...)`` with plain values,
from which its command and its name in ``studio.train`` come. Another program adds a kind by calling :func:`register`
in a module named in the setting ``plugins``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from adapters import discovery
from adapters.errors import InputError, nearest
from studio import settings
from studio.schema import JobConfig


@dataclass(frozen=True)
class Kind:
    """One kind of job.

    Attributes:
        name: what the queue and the commands call it.
        schema: ``"module:Class"`` of its :class:`~studio.schema.JobConfig`.
        entry: ``"module:function"``, called ``run(config, folder, monitor) -> dict``.
        continues: ``run`` also takes ``resume`` (a bool) and goes on from its last checkpoint when it is true;
            otherwise resuming starts the job over.
        ready: ``"module:function"``, called ``(config)`` before a job is made: raises :class:`InputError` for what is
            known to fail without doing it.
        estimate: ``"module:function"``, called ``(config, dtype) ->`` :class:`~studio.training.estimate.Work`: what one
            step of a training costs; empty where memory and time are not estimated.
        forecast: ``"module:function"``, called ``(config)``: what a compression will need and give
            (:class:`studio.compression.estimate.Forecast`), without doing it.
        afterwards: ``"module:function"``, called ``(config, result) -> result`` when the job is done.
        keeps_pipeline: the job uses the pipeline that the worker keeps loaded; it is released before other kinds.
        together: module of jobs that can run as one: ``check(configs)`` takes them by the name of their file or job
            and raises :class:`InputError` for what cannot be together; ``run(works)`` calls each work with its share
            of what they have in common, which ``run`` takes as ``member``, and returns when all have ended.
        federated: the training can be a client's in a federation: its data are one file or folder, and ``run`` takes
            ``plugins`` and ``keep``.
        title: what pages call it.
        train: name of a training: ``studio train NAME``, ``studio.train("NAME")``; empty for other kinds.
        compress: name of a method that makes a base smaller: ``studio compress NAME``; empty for other kinds.
        help, example: of a training's or compression's command.
        command: module whose ``register(group, kind)`` adds a training's command.
    """

    name: str
    schema: str
    entry: str
    continues: bool = False
    ready: str = ""
    estimate: str = ""
    forecast: str = ""
    afterwards: str = ""
    keeps_pipeline: bool = False
    together: str = ""
    federated: bool = False
    title: str = ""
    train: str = ""
    compress: str = ""
    help: str = ""
    example: str = ""
    command: str = "studio.training.commands.plain"

    def model(self) -> type[JobConfig]:
        """Import and return the schema."""
        found: type[JobConfig] = _load(self.schema)
        return found

    def parse(self, config: JobConfig | Mapping[str, Any]) -> JobConfig:
        """Validate ``config``; raises :class:`InputError` naming what is wrong."""
        values = config.model_dump(mode="json") if isinstance(config, JobConfig) else config
        return self.model().parse(values, source=f"the {self.name} job")

    def check(self, config: JobConfig) -> None:
        """Refuse what is known to fail; raises :class:`InputError`."""
        if self.ready:
            _load(self.ready)(config)

    def counts(self) -> Callable[..., Any]:
        """Import and return the function that counts what one step of a training costs.

        Raises:
            InputError: there is none.
        """
        if not self.estimate:
            raise InputError(f"Memory and time of {self.name} are not estimated.")
        function: Callable[..., Any] = _load(self.estimate)
        return function

    def foreseen(self, config: JobConfig) -> Any:
        """What the job will need and give.

        Raises:
            InputError: a base that cannot be read or used.
        """
        if not self.forecast:
            raise InputError(f"What {self.title or self.name} needs is known when it has run.")
        return _load(self.forecast)(config)

    def check_together(self, configs: Mapping[str, JobConfig]) -> None:
        """Refuse jobs that cannot run as one; raises :class:`InputError`.

        Args:
            configs: name of the file or job -> its configuration.
        """
        if not self.together:
            raise InputError(f"Jobs of the kind {self.name} run one by one.")
        importlib.import_module(self.together).check(configs)

    def run_together(self, works: Sequence[Callable[[Any], Any]]) -> None:
        """Run several jobs as one, each by its work."""
        importlib.import_module(self.together).run(works)

    def function(self) -> Callable[..., dict[str, Any]]:
        """Import and return the function that runs the job."""
        function: Callable[..., dict[str, Any]] = _load(self.entry)
        return function

    def finish(self, config: JobConfig, result: dict[str, Any]) -> dict[str, Any]:
        """Call ``afterwards``, if there is one; returns the result to be stored."""
        changed: dict[str, Any] = _load(self.afterwards)(config, result) if self.afterwards else result
        return changed


_KINDS: dict[str, Kind] = {}


def register(kind: Kind) -> Kind:
    """Make a kind known; the same name replaces the earlier one."""
    _KINDS[kind.name] = kind
    return kind


def find(name: str) -> Kind:
    """The kind called ``name``, or an :class:`InputError` listing the known ones."""
    if name not in _KINDS:
        _import_plugins(tuple(settings.load().plugins))
    if name not in _KINDS:
        raise InputError(f"Unknown kind of job '{name}'{nearest(name, _KINDS)}: choose {', '.join(_KINDS)}.")
    return _KINDS[name]


def trainings() -> dict[str, Kind]:
    """The kinds of training by their name in ``studio train``."""
    return {kind.train: kind for kind in _KINDS.values() if kind.train}


def compressions() -> dict[str, Kind]:
    """The kinds that make a base smaller, by their name in ``studio compress``."""
    return {kind.compress: kind for kind in _KINDS.values() if kind.compress}


def title(name: str) -> str:
    """What pages call the kind ``name``."""
    kind = _KINDS.get(name)
    return (kind.title if kind else "") or name


@cache
def _import_plugins(modules: tuple[str, ...]) -> None:
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise InputError(f"The plugin '{module}' named in the settings cannot be imported: {error}") from None


def _load(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


for _kind in (
    Kind("compose", "studio.composition.schema:ComposeConfig", "studio.composition.job:run", keeps_pipeline=True,
         title="Compose"),
    Kind("compare", "studio.composition.comparison_schema:CompareConfig", "studio.composition.comparison:run",
         keeps_pipeline=True, title="Compare"),
    Kind("sweep", "studio.composition.sweep_schema:SweepConfig", "studio.composition.sweep:run", keeps_pipeline=True,
         title="Sweep"),
    Kind("reconstruct", "studio.reconstruction.schema:ReconstructConfig", "studio.reconstruction.job:run",
         continues=True, title="Reconstruct"),
    Kind("federate", "studio.federation.schema:FederateConfig", "studio.federation.engine:run", continues=True,
         ready="studio.federation.clients:check", afterwards="studio.library.adopt:trained", title="Federate"),
    Kind("transcribe", "studio.transcription.schema:TranscribeConfig", "studio.transcription.job:run",
         ready="studio.transcription.job:ready", title="Transcribe"),
    Kind("forgetting", "studio.inspection.schema:ForgettingConfig", "studio.inspection.jobs:measure",
         title="Forgetting"),
    Kind("audit", "studio.audit.schema:AuditConfig", "studio.audit.job:run", title="Safety audit"),
    Kind("soften", "studio.inspection.schema:SoftenConfig", "studio.inspection.jobs:soften", title="Soften"),
    Kind("classify-rna", "studio.genomics.schema:ClassifyRnaConfig", "studio.genomics.job:run", continues=True,
         ready="studio.genomics.job:ready", title="Classify RNA"),
    Kind("generate-train", "studio.generation.schema:GenerateTrainConfig", "studio.generation.job:train",
         continues=True, title="Train a generator"),
    Kind("generate-sample", "studio.generation.schema:GenerateSampleConfig", "studio.generation.job:sample",
         title="Generate adapters"),
    Kind("transfer-prepare", "studio.transfer.schema:PrepareTransferConfig", "studio.transfer.preparation:prepare",
         continues=True, ready="studio.transfer.ready:prepare", title="Prepare a transfer"),
    Kind("transfer", "studio.transfer.schema:TransferConfig", "studio.transfer.job:run", continues=True,
         ready="studio.transfer.ready:transfer", afterwards="studio.transfer.job:kept", title="Transfer"),
    *(kind for place in ("studio.training.tasks", "studio.compression.methods") for file in discovery.sources(place)
      for kind in discovery.declarations(file, {"Kind": Kind}, "KIND")),
):  # fmt: skip
    register(_kind)
