"""What a compression will give, before it runs: bytes from the shapes, and what to expect of the quality."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.errors import InputError
from studio.compression.schema import CompressLqConfig

if TYPE_CHECKING:
    from studio.compression.base import Base

GB = 1e9


@dataclass(frozen=True)
class Estimate:
    """Of the new base's files.

    Attributes:
        bytes, base_bytes: of the new base and the old one.
        matrices, low_rank, rest: parts of ``bytes``: few-bit matrices, the low-rank part, everything else.
        bits: per weight of the matrices.
    """

    bytes: float
    base_bytes: float
    matrices: float
    low_rank: float
    rest: float
    bits: float

    @property
    def advice(self) -> str:
        """What to expect of so many bits, in one sentence."""
        if self.bits >= 4:
            return "At 4 bits and more the model usually changes little."
        if self.bits >= 3:
            return "Between 3 and 4 bits expect a small loss; rows of your own data keep what matters to you."
        if self.bits >= 2.5:
            return "Below 3 bits expect a loss that shows: give rows, and train afterwards with init lq_lora."
        return "Near 2 bits the loss is large: train afterwards with init lq_lora, or take more bits."


def estimated(config: CompressLqConfig) -> Estimate:
    """The estimate for ``config``; reads only the heads of the base's files.

    Raises:
        InputError: a base that cannot be compressed, or a size into which it does not fit.
    """
    from studio.compression.base import Base

    base = Base.of(config.base)
    low_rank = float(sum(2 * config.rank * (out + inputs) for out, inputs in base.matrices.values()))
    rest = float(base.bytes - sum(base.nbytes(f"{name}.weight") for name in base.matrices))
    bits = bits_of(config, base, low_rank + rest)
    matrices = base.count * bits / 8
    return Estimate(matrices + low_rank + rest, float(base.bytes), matrices, low_rank, rest, bits)


def bits_of(config: CompressLqConfig, base: Base, other: float) -> float:
    """Bits per weight of the matrices: as asked, or what is left of ``fit`` after ``other`` bytes.

    Raises:
        InputError: nothing useful is left.
    """
    if config.uniform:
        from adapters.compression.normal_float import Configuration

        return Configuration(int(config.uniform[2:])).bits_per_weight
    if config.fit is None:
        return config.bits
    bits = (config.fit * GB - other) * 8 / base.count
    if bits < 2.05:
        raise InputError(
            f"{config.fit:g} GB is too little: the rest of the model and a low-rank part of rank {config.rank} take "
            f"{other / GB:.3g} GB, and the matrices at least {base.count * 2.05 / 8 / GB:.3g}: lower the rank, or take "
            "a smaller base."
        )
    return min(bits, 8.0)


def apart(config: CompressLqConfig) -> Estimate:
    """:func:`estimated` in a separate process, so that the caller does not load torch.

    Raises:
        InputError: as :func:`estimated`.
    """
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "config.yaml"
        file.write_text(config.to_yaml(), encoding="utf-8")
        asked = [sys.executable, "-c", f"from {__name__} import printed; printed()", str(file)]
        answer = subprocess.run(asked, capture_output=True, text=True, check=False)
    try:
        found = json.loads(answer.stdout)
    except ValueError:
        raise InputError("The estimate could not be made: see  studio compress lq BASE --estimate.") from None
    if "error" in found:
        raise InputError(found["error"])
    return Estimate(**found)


def printed() -> None:
    """Print the estimate of a configuration file as JSON, in the process that :func:`apart` starts."""
    from studio import silence

    silence.library_warnings()
    try:
        print(json.dumps(asdict(estimated(CompressLqConfig.from_yaml(sys.argv[1])))))
    except InputError as error:
        print(json.dumps({"error": str(error)}))
