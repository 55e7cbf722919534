"""Sample-level differential privacy of a client: DP-SGD on its adapter, by Opacus.

M. Abadi et al., Deep Learning with Differential Privacy, arXiv 1607.00133. In every local step

    each example joins with probability q = b / n;   g_i <- g_i min(1, C / |g_i|),   over everything that is trained
    g = (sum_i g_i + N(0, sigma^2 C^2 I)) / b

and any optimiser takes g. A step whose batch is empty still adds noise. The unit is one row of the data, and one row's
loss is a mean over its own tokens, so that no example scales another's. Sigma is chosen once, for all steps of all
rounds; the accountant (PRV; RDP is reported beside it) is kept in the client's folder over rounds. Averaging on the
server is post-processing and costs nothing.

Which examples join, and the noise, follow from a secret that the client draws once and never sends, so that a round
done again after an interruption is the same release. They come from torch's and Python's generators, which are not
cryptographic. The losses that a client reports are outside the guarantee.
"""

from __future__ import annotations

import importlib.util
import json
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import files
from adapters.errors import InputError, MissingDependencyError
from adapters.plugin import Answers, Handles, Outputs, Plugin
from studio.datasets.seeds import derive, rng
from studio.federation.schema import FederateConfig

if TYPE_CHECKING:
    from torch import Tensor

History = list[tuple[float, float, int]]
"""(sigma, q, steps) of every round, as accountants call it."""


def check_installed() -> None:
    """Raise :class:`MissingDependencyError` without Opacus."""
    if importlib.util.find_spec("opacus") is None:
        raise MissingDependencyError("opacus", "private", "Sample-level privacy")


def check(config: FederateConfig, training: Any) -> None:
    """Refuse a client's training that DP-SGD cannot protect.

    Raises:
        InputError: names the key.
    """
    if config.privacy == "none":
        return
    if not hasattr(training, "max_length") and config.train != "classifier":
        raise InputError(f"privacy: 'sample' is for language models and classifiers, not for '{config.train}'.")
    refused = {
        "gradient_accumulation": (1, "a step is one batch"),
        "gradient_checkpointing": (False, "recomputed passes would count examples twice"),
        "packing": (False, "a packed row holds several examples"),
        "use_dora": (False, "its magnitudes have no gradients per example"),
        "perturb": ("none", "its second pass would not be accounted for"),
        "reg": ("none", "its term on the logits mixes examples"),
    }
    for key, (allowed, why) in refused.items():
        if getattr(training, key, allowed) != allowed:
            raise InputError(f"privacy needs {key} to be {allowed!r}: {why}.")


def sigma_for(epsilon: float, delta: float, q: float, steps: int) -> float:
    """The noise multiplier with which ``steps`` steps spend ``epsilon``, by the PRV accountant."""
    from opacus.accountants.utils import get_noise_multiplier

    with _quiet():
        return float(get_noise_multiplier(
            target_epsilon=epsilon, target_delta=delta, sample_rate=q, steps=steps, accountant="prv"
        ))  # fmt: skip


def epsilon_of(history: History, delta: float, accountant: str = "prv") -> float:
    """Epsilon that a history spends."""
    from opacus.accountants import create_accountant

    counted: Any = create_accountant(accountant)
    counted.history = list(history)
    with _quiet():
        return float(counted.get_epsilon(delta=delta)) if history else 0.0


def losses(logits: Tensor, labels: Tensor, shifted: bool) -> Tensor:
    """The loss of each example (batch,): the mean over its own tokens, or that of its one label."""
    import torch.nn.functional as F

    if logits.ndim == 2:
        return F.cross_entropy(logits.float(), labels.view(-1), reduction="none")
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    each = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return each.sum(1) / (labels != -100).sum(1).clamp_min(1)


class Guard(Plugin):
    """DP-SGD in one client's training of one round.

    Args:
        epsilon, delta, clip: of all rounds together; C.
        rounds: planned; sigma is chosen for them.
        number: of this round.
        file: the client's accountant, kept over rounds.
    """

    name = "privacy"

    def __init__(self, epsilon: float, delta: float, clip: float, rounds: int, number: int, file: Path) -> None:
        self.epsilon, self.delta, self.clip, self.rounds = epsilon, delta, clip, rounds
        self.number, self.file = number, file
        self.kept: dict[str, Any] = {}
        self.empty: set[int] = set()
        self._step = self._examples = self._expected = 0
        self._hooks: Any = None

    @classmethod
    def of(cls, config: FederateConfig, file: Path, number: int) -> Guard:
        """The guard of a federation's client."""
        check_installed()
        return cls(config.target_epsilon, config.delta, config.clip, config.rounds, number, file)

    # ---------------------------------------------------------------- plan
    def batches(self, samples: int, size: int, steps: int) -> list[list[int]]:
        """Poisson batches of this round; an empty one holds one example whose loss does not count.

        Raises:
            InputError: fewer examples than a batch, a delta that protects nobody, or more rounds than were planned.
        """
        if samples < size:
            raise InputError(f"privacy: {samples} examples are fewer than batch_size {size}: lower batch_size.")
        if not self.delta < 1 / samples:
            raise InputError(f"privacy: delta {self.delta:g} must be below 1 / {samples} examples: lower it.")
        self.kept, self._expected = self._plan(size / samples, steps), size
        secret = int(self.kept["secret"], 16)
        made = []
        for step in range(steps):
            random = rng(secret, f"batch {self.number}", step)
            batch = [number for number in range(samples) if random.random() < self.kept["q"]]
            if not batch:
                self.empty.add(step)
            made.append(batch or [0])
        return made

    def _plan(self, q: float, steps: int) -> dict[str, Any]:
        wanted = {"epsilon": self.epsilon, "delta": self.delta, "q": q, "steps": steps, "clip": self.clip}
        if not self.file.is_file():
            sigma = sigma_for(self.epsilon, self.delta, q, steps * self.rounds)
            return {**wanted, "rounds": self.rounds, "sigma": sigma, "secret": secrets.token_hex(7), "done": {}}
        kept: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8"))
        differing = [key for key, value in wanted.items() if kept[key] != value]
        if differing:
            told = ", ".join(differing)
            raise InputError(f"privacy: {told} changed since the first round, for which the noise was chosen.")
        if self.number > kept["rounds"]:
            raise InputError(
                f"privacy: the noise was chosen for {kept['rounds']} rounds, and they are spent: start a new run."
            )
        return kept

    # ---------------------------------------------------------------- steps
    def after_inject(self, handles: Handles) -> None:
        import torch
        from opacus.grad_sample import GradSampleHooks
        from opacus.optimizers import DPOptimizer

        (model,) = handles.models.values()
        self._names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        with _quiet():
            self._hooks = GradSampleHooks(model, strict=False, loss_reduction="mean")
        noise = torch.Generator().manual_seed(derive(int(self.kept["secret"], 16), "noise", self.number))
        assert handles.optimizer is not None
        self._private = DPOptimizer(
            handles.optimizer, noise_multiplier=self.kept["sigma"], max_grad_norm=self.clip,
            expected_batch_size=self._expected, generator=noise,
        )  # fmt: skip

    def step_begin(self, step: int) -> None:
        self._step = step

    def loss(self, loss: Tensor, outputs: Outputs | Answers) -> tuple[Tensor, dict[str, float]]:
        assert isinstance(outputs, Answers)
        found = losses(outputs.logits, outputs.labels, outputs.shifted)
        self._examples = len(found)
        return found.mean() * (0.0 if self._step in self.empty else 1.0), {}

    def grads_ready(self, step: int) -> None:
        """Replace the gradients by the clipped, noised ones.

        Raises:
            InputError: a trained tensor without a gradient for each example (named).
        """
        for parameter in self._private.params:
            found = getattr(parameter, "grad_sample", None)
            if found is None or len(found) != self._examples:
                name = self._names.get(id(parameter), "a tensor")
                raise InputError(f"privacy: '{name}' has no gradient for each example: train other layers.")
        with _quiet():
            self._private.clip_and_accumulate()
            self._private.add_noise()
            self._private.scale_grad()
        for parameter in self._private.params:
            parameter.grad_sample = parameter.summed_grad = None

    # ---------------------------------------------------------------- accounts
    @property
    def history(self) -> History:
        """Every round so far with this one."""
        done = {**self.kept["done"], str(self.number): self.kept["steps"]}
        return [(self.kept["sigma"], self.kept["q"], int(steps)) for steps in done.values()]

    def spent(self) -> float:
        """Epsilon spent with this round, by the PRV accountant."""
        return epsilon_of(self.history, self.delta)

    def save(self) -> None:
        """Keep the accountant for the next round, and take the hooks off the model."""
        self.kept["done"] = {**self.kept["done"], str(self.number): self.kept["steps"]}
        files.write_text(self.file, json.dumps(self.kept))
        self._hooks.remove_hooks()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Opacus' warnings for people who call it themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

