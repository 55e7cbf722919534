"""The configuration of a federation: who trains what on which data, how the server combines it, how it is kept private.

The same file drives the run in one process and the deployment over a network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from adapters import catalogue
from adapters.federated.facts import refuse_secure_aggregation
from studio.jobs import kinds
from studio.schema import JobConfig
from studio.training.schemas import rules
from studio.training.schemas.base import option

if TYPE_CHECKING:
    Method = str
    Training = str
else:
    Method = Literal[tuple(rule.name for rule in catalogue.stage("federated"))]
    Training = Literal[tuple(name for name, kind in kinds.trainings().items() if kind.federated)]

_MAIN = option("Federation")
_MORE = option("Federation", advanced=True)
_DATA = option("Who has what")
_PRIVACY = option("Privacy")
_PRIVACY_MORE = option("Privacy", advanced=True)

SERVERS_OWN = ("name", "data", "validation_data", "seed")
"""Keys of the training that the federation sets for every client and round."""


class ClientFields(BaseModel):
    """One client: its data, what its result is measured on, and what differs from the others' training."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="Name of the client.")
    data: str = Field(description="Its data, as the training's data.")
    test: str = Field("", description="Data on which the shared adapter is measured, never trained on.")
    rank: int | None = Field(None, ge=1, description="Its own rank (flora and flexlora); empty = the training's.")

    _file_name = field_validator("name")(rules.file_name)


class FederateConfig(JobConfig):
    """Train one adapter on the data of several clients, which only send what they trained."""

    kind: ClassVar[str] = "federate"

    name: str = Field("federated", description="Name of the new adapter.", json_schema_extra=_MAIN)
    method: Method = Field(
        "fedit",
        description="How the server combines what clients send: "
        + " ".join(f"{rule.name}: {rule.summary}" for rule in catalogue.stage("federated")),
        json_schema_extra=_MAIN,
    )
    rounds: int = Field(
        5, ge=1, description="How often clients train and the server combines.", json_schema_extra=_MAIN
    )
    train: Training = Field(
        "language", description="What clients train: a kind of studio train.", json_schema_extra=_MAIN
    )
    training: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings of that training (studio train KIND --help); steps and epochs are those of one round.",
        json_schema_extra=_MAIN,
    )
    weights: Literal["examples", "uniform"] = Field(
        "examples", description="Clients count by their examples, or equally.", json_schema_extra=_MORE
    )
    min_clients: int | None = Field(
        None,
        ge=1,
        description="Clients that must answer for a round to count; empty = more than half. Others are named and left "
        "out of the round.",
        json_schema_extra=_MORE,
    )
    evaluate_every: int = Field(
        1, ge=0, description="Measure the shared adapter every N rounds; 0 = only at the end.", json_schema_extra=_MORE
    )
    seed: int = Field(0, ge=0, description="Seed of partition, order of data and factors.", json_schema_extra=_MORE)
    correction: Literal["ridge", "cosine"] = Field(
        "ridge", description="lora-fair: closed form, or the paper's cosine.", json_schema_extra=_MORE
    )
    strength: float = Field(
        0.01, ge=0, description="lora-fair: lambda; larger keeps B nearer to the mean.", json_schema_extra=_MORE
    )
    sb_batches: int = Field(
        4, ge=1, description="fed-sb: batches per client that measure the first full step.", json_schema_extra=_MORE
    )
    sb_step: float | None = Field(
        None, gt=0, description="fed-sb: size of that step; empty = a tenth of the learning rate.",
        json_schema_extra=_MORE,
    )  # fmt: skip
    public_data: str = Field(
        "",
        description="fed-sb: public data for the first full step, instead of gradients of the clients' own data.",
        json_schema_extra=_MORE,
    )

    clients: list[ClientFields] = Field(
        default_factory=list,
        description="Clients with files or folders of their own: {name: a, data: a.jsonl, test: a-test.jsonl}.",
        json_schema_extra=_DATA,
    )
    data: str = Field(
        "", description="Instead of clients: one file of rows, divided among simulated ones.", json_schema_extra=_DATA
    )
    count: int = Field(4, ge=1, description="data: number of simulated clients.", json_schema_extra=_DATA)
    partition: Literal["even", "column", "dirichlet", "mild", "severe"] = Field(
        "even",
        description="data: even: at random; column: a client for each value of by; dirichlet: labels in by are "
        "drawn unevenly; mild, severe: each client mostly (85 %, 95 %) has one share of the labels in by.",
        json_schema_extra=_DATA,
    )
    by: str = Field("", description="data: the column that divides the rows.", json_schema_extra=_DATA)
    concentration: float = Field(
        0.5, gt=0, description="dirichlet: smaller is more uneven.", json_schema_extra=_DATA
    )
    test_share: float = Field(
        0.2, ge=0, lt=1, description="data: share of each client's rows kept for measuring.", json_schema_extra=_DATA
    )
    test_by: str = Field(
        "",
        description="data: rows with the same value in this column are kept together, for training or for measuring, "
        "over all clients.",
        json_schema_extra=_DATA,
    )

    privacy: Literal["none", "sample"] = Field(
        "none",
        description="sample: each client trains with DP-SGD, so that no single example shows in what it sends (extra "
        "'private').",
        json_schema_extra=_PRIVACY,
    )
    target_epsilon: float = Field(
        3.0, gt=0, description="sample: epsilon that a client spends over all rounds.", json_schema_extra=_PRIVACY
    )
    delta: float = Field(
        1e-5, gt=0, lt=1, description="sample: delta; below 1 / examples of every client.", json_schema_extra=_PRIVACY
    )
    clip: float = Field(
        1.0, gt=0, description="sample: largest norm of one example's gradient.", json_schema_extra=_PRIVACY
    )
    public_calibration: bool = Field(
        False,
        description="fed-sb with privacy: public_data is really public, so its gradients are not accounted for.",
        json_schema_extra=_PRIVACY_MORE,
    )
    secure_aggregation: bool = Field(
        False,
        description="Deployment: the server sees only the sum of what three clients or more send (SecAgg+).",
        json_schema_extra=_PRIVACY,
    )

    _file_name = field_validator("name")(rules.file_name)

    @model_validator(mode="after")
    def _combinations(self) -> FederateConfig:
        rules.refuse(self, _REFUSED)
        if self.secure_aggregation:
            refuse_secure_aggregation(catalogue.find("federated", self.method))
        return self


def _twice(config: FederateConfig) -> bool:
    return len({client.name.lower() for client in config.clients}) < len(config.clients)


_REFUSED: list[rules.Refusal] = [
    (lambda c: not c.clients and not c.data, "name clients with their data, or one data file to divide among some"),
    (lambda c: c.clients and c.data, "data come from clients or from one data file, not from both"),
    (_twice, "two clients have the same name"),
    (lambda c: c.data and c.partition != "even" and not c.by, "this partition needs the column that divides: set by"),
    (lambda c: c.clients and (c.min_clients or 1) > len(c.clients), "min_clients is more than there are clients"),
    (
        lambda c: c.method not in ("flora", "flexlora") and any(client.rank for client in c.clients),
        "clients may have ranks of their own with flora and flexlora only",
    ),
    (
        lambda c: any(key in c.training for key in SERVERS_OWN),
        f"the federation sets {', '.join(SERVERS_OWN)} of every client's training: leave them out of training",
    ),
    (
        lambda c: c.privacy == "sample" and c.method == "fed-sb" and not (c.public_data and c.public_calibration),
        "fed-sb's first step looks at data without noise: with privacy name public_data, and say that it is public "
        "with public_calibration",
    ),
    (lambda c: c.public_data and c.method != "fed-sb", "public_data is for fed-sb: leave it out"),
    (lambda c: c.secure_aggregation and c.clients and len(c.clients) < 3, "secure aggregation needs three clients"),
]
