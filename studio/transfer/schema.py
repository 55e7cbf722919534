"""Configurations of both jobs: keeping what a later transfer needs, and the transfer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from adapters.generation.trans_lora import QUESTION, TaskFormat, TaskTemplate
from studio.schema import JobConfig
from studio.training.schemas import rules

if TYPE_CHECKING:
    from studio.training.schemas.language import TrainLanguageConfig

_TASK: dict[str, Any] = {"group": "Task"}
_TASK_MORE: dict[str, Any] = {"group": "Task", "advanced": True}
_WRITING: dict[str, Any] = {"group": "Written inputs"}
_WRITING_MORE: dict[str, Any] = {"group": "Written inputs", "advanced": True}
_TRAINING: dict[str, Any] = {"group": "Training"}
_TRAINING_MORE: dict[str, Any] = {"group": "Training", "advanced": True}

SET = ("base", "data", "name", "seed", "dtype", "device", "task", "system_prompt", "chat_template", "sample_prompts")
"""Keys of a language training that both jobs set themselves."""


REPORT = "report.json"
"""What a transfer came to, in the job's folder."""


class TransferFields(JobConfig):
    """What both jobs have: how models write inputs, and how an adapter is trained."""

    temperature: float = Field(
        1.0, gt=0, le=100, description="How varied written inputs are.", json_schema_extra=_WRITING
    )
    top_p: float = Field(
        0.95, gt=0, le=1, description="Sample from the likeliest tokens of this total.", json_schema_extra=_WRITING_MORE
    )
    input_tokens: int = Field(128, ge=1, description="Longest written input, in tokens.", json_schema_extra=_WRITING)
    prompting: Literal["auto", "chat", "plain"] = Field(
        "auto", json_schema_extra=_WRITING,
        description="How it is asked for more: a request (chat), or examples to go on with (plain); auto = chat where "
        "the model has a chat template.",
    )  # fmt: skip
    tries: int = Field(
        50, ge=1, description="Give up when more inputs than this are written for each one kept.",
        json_schema_extra=_WRITING,
    )  # fmt: skip
    near: float = Field(
        0.9, gt=0, description="Similarity (Jaccard, letter trigrams) from which an input repeats an earlier one; "
        "above 1 = only exact repeats.", json_schema_extra=_WRITING_MORE,
    )  # fmt: skip
    batch: int = Field(
        8, ge=1, description="Inputs written, judged and answered at a time.", json_schema_extra=_WRITING_MORE
    )

    rank: int = Field(16, ge=1, description="Rank of the adapter that is trained.", json_schema_extra=_TRAINING)
    alpha: float | None = Field(
        None,
        gt=0,
        description="The update is scaled by alpha / rank; empty = 2 rank.",
        json_schema_extra=_TRAINING_MORE,
    )
    epochs: int = Field(3, ge=1, description="Passes over the examples.", json_schema_extra=_TRAINING)
    learning_rate: float = Field(2e-4, description="Learning rate.", json_schema_extra=_TRAINING)
    training: dict[str, Any] = Field(
        {}, json_schema_extra=_TRAINING_MORE,
        description="Other settings of that training (studio train language --help): steps=200, targets=attention ...",
    )  # fmt: skip

    seed: int = Field(0, ge=0, description="Seed of all random numbers.")
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="Precision of the models.", json_schema_extra={"group": "Model", "advanced": True}
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps ...")

    _positive_rate = field_validator("learning_rate")(rules.learning_rate)

    def trained(self, base: str, data: str, name: str, **more: Any) -> TrainLanguageConfig:
        """The training as a configuration of its own.

        Raises:
            InputError: a setting that it does not have or take, or that the job sets itself.
        """
        from studio.training.schemas.language import TrainLanguageConfig

        own: dict[str, Any] = {
            "base": base, "data": data, "name": name, "seed": self.seed, "dtype": self.dtype, "device": self.device,
            "rank": self.rank, "alpha": self.alpha or 2 * self.rank, "learning_rate": self.learning_rate,
        }  # fmt: skip
        if "steps" not in self.training:
            own["epochs"] = self.epochs
        return TrainLanguageConfig.parse({**own, **more, **self.training}, source="training")

    @model_validator(mode="after")
    def _training(self) -> TransferFields:
        taken = {*SET, *type(self).model_fields}
        if odd := sorted(taken & self.training.keys()):
            raise ValueError(f"'{odd[0]}' has a field of its own, or is set by the transfer: leave it out of training")
        self.trained("base", "data.jsonl", "name")
        return self


class PrepareTransferConfig(TransferFields):
    """Keep what a later transfer of a language adapter needs, while its data are there (Trans-LoRA)."""

    kind: ClassVar[str] = "transfer-prepare"

    adapter: str = Field(min_length=1, description="Language adapter: name in the library, file or PEFT folder.")
    base: str = Field(
        min_length=1, description="The base it was trained on: name in the library, folder or hub id.",
        json_schema_extra={"group": "Model"},
    )  # fmt: skip
    data: str = Field(
        min_length=1, description="Rows it was trained on (.jsonl, .csv ... as for studio train language); they are "
        "not kept, apart from the seeds.",
    )  # fmt: skip
    out: str = Field("", description="Folder for the bundle; empty = in the job's folder.")
    seeds: int = Field(5, ge=1, description="Inputs of the data that are kept as examples.")
    discriminator: bool = Field(
        True, description="Train the filter; without it the transfer takes whatever the target writes."
    )
    samples: int = Field(
        400, ge=2, description="Train it on at most so many rows, and as many written inputs.",
        json_schema_extra=_TRAINING,
    )  # fmt: skip
    held_out: float = Field(
        0.2, gt=0, lt=1, description="Share of them that it is only measured on.", json_schema_extra=_TRAINING_MORE
    )
    force: bool = Field(False, description="Keep a discriminator that is no better than chance.")

    form: TaskFormat = Field("free", description="What inputs and answers look like.", json_schema_extra=_TASK)
    input_pattern: str = Field(
        "", description="Regular expression that is in every input.", json_schema_extra=_TASK_MORE
    )
    answer_pattern: str = Field(
        "", description="Regular expression that is in every answer.", json_schema_extra=_TASK_MORE
    )
    chat_template: str = Field(
        "", description="'chatml' or a Jinja file, if the adapter was trained with one; empty = the base's own.",
        json_schema_extra=_TASK_MORE,
    )  # fmt: skip
    question: str = Field(
        QUESTION, description="What the discriminator is asked, with {input}, {yes} and {no}.",
        json_schema_extra=_TASK_MORE,
    )  # fmt: skip
    yes: str = Field("Yes", description="Its answer to inputs of the task, one token.", json_schema_extra=_TASK_MORE)
    no: str = Field("No", description="Its answer to others, one token.", json_schema_extra=_TASK_MORE)

    @model_validator(mode="after")
    def _template(self) -> PrepareTransferConfig:
        self.template(labels=("any",))
        return self

    def template(self, labels: tuple[str, ...] = (), system: str = "", chat_template: str = "") -> TaskTemplate:
        """The task's template with what the data say.

        Raises:
            InputError: as :class:`~adapters.generation.trans_lora.TaskTemplate`.
        """
        return TaskTemplate(
            self.form, self.input_pattern, self.answer_pattern, labels if self.form == "classification" else (),
            system, chat_template, self.question, self.yes, self.no,
        )  # fmt: skip


class TransferConfig(TransferFields):
    """Move a language adapter to another base without its data (Trans-LoRA)."""

    kind: ClassVar[str] = "transfer"

    bundle: str = Field(min_length=1, description="Bundle made by studio transfer prepare.")
    to: str = Field(
        min_length=1, description="The base to move to: name in the library, folder or hub id.",
        json_schema_extra={"group": "Model"},
    )  # fmt: skip
    base: str = Field(
        "", description="Where the adapter's own base is now; empty = what the bundle says.",
        json_schema_extra={"group": "Model"},
    )  # fmt: skip
    name: str = Field("transferred", description="Name of the new adapter.")
    count: int | None = Field(
        None, ge=1, description="Examples to make; empty = as many as the adapter was trained on.",
        json_schema_extra=_WRITING,
    )  # fmt: skip
    filter: bool = Field(True, description="Keep only inputs that the discriminator takes for the task's.")
    tau: float = Field(
        0.0, allow_inf_nan=False, description="Keep inputs whose logit(Yes) - logit(No) is above this.",
        json_schema_extra=_WRITING_MORE,
    )  # fmt: skip
    answer_tokens: int = Field(
        128, ge=1, description="Longest answer of the source, in tokens; longer ones are left out.",
        json_schema_extra=_WRITING,
    )  # fmt: skip
    chat_template: str = Field(
        "", description="'chatml' or a Jinja file for a target without a chat template.",
        json_schema_extra={"group": "Model", "advanced": True},
    )  # fmt: skip
    teacher: Literal["hard", "kl"] = Field(
        "hard", description="What is learnt of the source's answers: their text (hard), or the probabilities of their "
        "tokens (kl; both bases need one tokenizer, and memory at once).", json_schema_extra=_TRAINING_MORE,
    )  # fmt: skip
    peft: Literal["lora", "dora", "prompt"] = Field(
        "lora", description="What is trained on the target: a LoRA, a DoRA, or learnt tokens before every question "
        "(prompt tuning; a PEFT folder that the library does not hold).", json_schema_extra=_TRAINING,
    )  # fmt: skip
    virtual_tokens: int = Field(16, ge=1, description="prompt: learnt tokens.", json_schema_extra=_TRAINING_MORE)
    validation_split: float = Field(
        0.1, ge=0, lt=1, description="Share of the examples held out to measure on.", json_schema_extra=_TRAINING_MORE
    )
    test_data: str = Field(
        "", description="Rows with answers: the share answered exactly by the source with its adapter, by the target "
        "alone and with the new one is reported; nothing is trained on them.",
    )  # fmt: skip
    test_limit: int = Field(200, ge=1, description="Ask at most so many of them.")

    _file_name = field_validator("name")(rules.file_name)
