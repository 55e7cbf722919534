"""Does the doctor's prediction agree with what happens in pictures?

    python -m benchmarks.interference BLEED.json [--json]

``BLEED.json`` holds another benchmark's measurements, ``{"fox + robot": 0.31, ...}`` (share of pictures in which a
concept turns up where it should not). Prints both numbers of every pair and their rank correlation (Spearman's rho)
with a 95 % bootstrap interval (2000 resamplings of the pairs) and the p-value of a permutation test, exact for few
pairs.

Other programs call :func:`validate` with their measurements.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from adapters.errors import InputError

Pair = tuple[str, str]


@dataclass(frozen=True)
class Agreement:
    """How well a prediction ranks the pairs.

    Attributes:
        rho: Spearman's rank correlation, -1 to 1; NaN when one side is the same for all pairs.
        low, high: 95 % interval of rho by resampling pairs.
        p: probability of a rho at least as large without any relation (permutation test, one-sided).
        pairs: how many pairs were compared.
    """

    rho: float
    low: float
    high: float
    p: float
    pairs: int

    def __str__(self) -> str:
        return f"rho {self.rho:.2f} (95 % {self.low:.2f} to {self.high:.2f}), p {self.p:.3f}, {self.pairs} pairs"


def validate(
    predicted: Mapping[Pair, float], measured: Mapping[Pair, float], resamples: int = 2000, seed: int = 0
) -> Agreement:
    """Rank correlation of predicted interference and measured bleed over the pairs that both know, in any order.

    Raises:
        InputError: fewer than three common pairs.
    """
    known = {frozenset(pair): value for pair, value in predicted.items()}
    common = [(known[frozenset(pair)], value) for pair, value in measured.items() if frozenset(pair) in known]
    if len(common) < 3:
        raise InputError(f"A rank correlation needs three pairs at least; {len(common)} are known on both sides.")
    x, y = np.array(common).T
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return Agreement(float("nan"), float("nan"), float("nan"), 1.0, len(x))
    rho = float(stats.spearmanr(x, y).statistic)
    test = stats.permutation_test(
        (x,), lambda shuffled: _rho(shuffled, y), permutation_type="pairings", alternative="greater",
        n_resamples=resamples, vectorized=False, rng=np.random.default_rng(seed),
    )  # fmt: skip
    generator = np.random.default_rng(seed)
    drawn = [_rho(x[k], y[k]) for k in generator.integers(0, len(x), (resamples, len(x)))]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Agreement(rho, float(low), float(high), float(test.pvalue), len(x))


def predicted_for(adapters: Sequence[str]) -> dict[Pair, float]:
    """The doctor's prediction for every pair of adapters of the library."""
    from studio.inspection import doctor

    return doctor.diagnose(adapters).predicted()


def _rho(x: np.ndarray, y: np.ndarray) -> float:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path)
    parser.add_argument("--json", action="store_true", help="machine-readable result")
    options = parser.parse_args()
    text: dict[str, float] = json.loads(options.measured.read_text(encoding="utf-8"))
    measured = {(key.partition(" + ")[0], key.partition(" + ")[2]): value for key, value in text.items()}
    predicted = predicted_for(sorted({name for pair in measured for name in pair}))
    found = validate(predicted, measured)
    if options.json:
        print(json.dumps(asdict(found)))
        return
    for (first, second), value in sorted(measured.items(), key=lambda item: -item[1]):
        expected = predicted.get((first, second), predicted.get((second, first), float("nan")))
        print(f"{first} + {second}: predicted {expected:.3f}, measured {value:.3f}")
    print(found)


if __name__ == "__main__":
    main()
