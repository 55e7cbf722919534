"""The result of ``benchmarks.lora3d`` in words: tables of ratios, the spec's bars, what was missed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from assets.build.dust3r import GATE_NEAR, GATE_SHIFT
from pipelines.geometry import verification

ARMS = ("self", "paper", "raw confidence", "other scene", "pre-training pairs", "true labels")
MEASURES = ("pair_error", "near_error", "ate", "ate_verified")


def ratios(scenes: Sequence[dict[str, Any]], arm: str, measure: str) -> np.ndarray:
    """Per scene that has the arm: its error over the base's."""
    return np.array([s[arm][measure] / s["base"][measure] for s in scenes if s.get(arm) and s.get("base")])


def verdicts(scenes: Sequence[dict[str, Any]]) -> list[str]:
    """The spec's bars, each with what was measured."""

    def median(arm: str, measure: str) -> float:
        return float(np.nanmedian(ratios(scenes, arm, measure)))

    own, count = ratios(scenes, "self", "pair_error"), len(scenes)
    rows = [
        ("median pair error, self / base", median("self", "pair_error"), "<=", 0.9),
        (f"scenes improved (of {count})", float((own < 1).sum()), ">=", 6.0 * count / 8),
        ("median ATE, self / base", median("self", "ate"), "<=", 0.95),
        ("median near-pair error, self / base", median("self", "near_error"), "<=", 1.05),
    ]
    rows += [
        (f"median pair error, self / {arm}", float(np.nanmedian(own / ratios(scenes, arm, "pair_error"))), sign, 1.0)
        for arm, sign in zip(ARMS[1:], ("<", "<", "<", "<", ">="), strict=True)
    ]
    compare = {"<=": np.less_equal, ">=": np.greater_equal, "<": np.less}
    return [f"| {name} | {value:.3g} | {sign} {bar:.3g} | {'met' if compare[sign](value, bar) else '**missed**'} |"
            for name, value, sign, bar in rows]  # fmt: skip


def report(result: dict[str, Any]) -> str:
    """The result in words."""
    gates, plan = result["gates"], result["plan"]
    lines = [
        "# LoRA3D on the embedded base", "", "`python -m benchmarks.lora3d --write`", "",
        f"Gates: near pairs {gates['near']:.3f} (at most {GATE_NEAR}), wide pairs {gates['wide']:.3f}, "
        f"{gates['ratio']:.2f} times as much (at least {GATE_SHIFT}).", "",
    ]  # fmt: skip
    if gates["void"]:
        lines += ["**The gates are missed: the claim that self-calibration helps is void for this base.** It is "
                  "trained too little to be a base worth calibrating; nothing is claimed from it.", ""]  # fmt: skip
    scenes = result["scenes"]
    whole = [scene for scene in scenes if scene.get("base") and all(scene.get(arm) for arm in ARMS)]
    if whole:
        kept = [np.median([scene[arm]["kept"] for scene in whole]) for arm in ("self", "paper")]
        lines += [f"## {len(whole)} unseen scenes", "",
                  f"{plan['views']} calibration and as many test views over 180 degrees, {plan['steps']} alignment "
                  f"steps, rank {plan['rank']}, {plan['epochs']} epochs in batches of {plan['batch']} pairs, trunk in "
                  f"{plan['dtype']}; the judging alignment sees every {plan['stride']}nd row and column. Labels keep "
                  f"{kept[0]:.0%} of the pixels (median), the paper's {kept[1]:.0%}. Error over the base's, median "
                  "(range); below 1 is better. The last column but one is the camera error with the pairs left out "
                  "whose pictures contradict each other, for base and adapter alike:", "",
                  "| labels | pair error | near pairs | ATE | ATE, verified pairs | scenes improved |",
                  "|---|---|---|---|---|---|"]  # fmt: skip
        for arm in ARMS:
            cells = []
            for measure in MEASURES:
                values = ratios(whole, arm, measure)
                cells.append(f"{np.nanmedian(values):.2f} ({np.nanmin(values):.2f} to {np.nanmax(values):.2f})")
            better = int((ratios(whole, arm, "pair_error") < 1).sum())
            lines.append(f"| {arm} | {' | '.join(cells)} | {better} of {len(whole)} |")
        base = [np.median([scene["base"][measure] for scene in whole]) for measure in MEASURES]
        lines += ["", f"The base itself, in metres (median): {base[0]:.3f} pairs, {base[1]:.3f} near pairs, "
                  f"{base[2]:.3f} ATE, {base[3]:.3f} ATE with verified pairs.", "",
                  "| what | measured | bar | |", "|---|---|---|---|", *verdicts(whole)]  # fmt: skip
        spent = [sum(piece["cpu_seconds"] for piece in scene.values() if isinstance(piece, dict)) for scene in whole]
        own = [scene["self"]["cpu_seconds"] for scene in whole]
        lines += ["", f"CPU seconds on one core: {np.median(spent):.0f} a scene, of which {np.median(own):.0f} for "
                  "labels, training and judging of the self-calibrated adapter."]  # fmt: skip
    else:
        lines.append("The scenes were not run.")
    if "scenes_date" in result:
        seeds = [scene["seed"] for scene in whole]
        lines += ["", f"These are the scenes {min(seeds)} to {max(seeds)}, run on {result['scenes_date']}: some were "
                  "looked at while the method was made. The benchmark now takes scenes that nobody has looked at; they "
                  "have not been run yet (about 40 CPU minutes). Everything below is of fresh rooms."]  # fmt: skip
    if len(whole) < len(scenes):
        lines += ["", f"{len(scenes) - len(whole)} further scene(s) are not finished and not counted."]
    return "\n".join([*lines, "", *_report_telling(result), *_report_core(result)]) + "\n"


def _report_telling(result: dict[str, Any]) -> list[str]:
    row = result["telling"]
    if not row:
        return []
    return ["## Which pairs are right", "",
            f"Of {row['pairs']} ordered pairs of the calibration views {row['right']} err by less than "
            f"{result['right']:g} m. Confidence (the spanning tree's score) tells them from the others with an area "
            f"under the curve of {row['confidence']:.3f}, agreement in colour with {row['agreement']:.3f}: at least "
            f"{verification.LEAST:g} have {row['believed_right']:.0%} of the right and {row['believed_wrong']:.0%} of "
            "the wrong ones (one order alone; both must).", ""]  # fmt: skip


_RATIOS = ("ate_ratio", "point_ratio", "verified_ratio", "verified_point_ratio")


def _range(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.2f} ({row['low'][name]:.2f} to {row['high'][name]:.2f})"


def _report_core(result: dict[str, Any]) -> list[str]:
    lines = []
    if result["core"]:
        column = {name: [row[name] for row in result["core"]] for name in result["core"][0]}
        lines += ["## The alignment alone", "",
                  f"{len(result['core'])} rendered rooms, 6 views of 24 x 24 over {result['spread']} degrees, no "
                  "network. Of every pair with less than half overlap the second view is turned by 6 to 20 degrees "
                  "and rescaled, 7 % of all pixels are scattered, and all are sure. Each room is aligned "
                  f"{result['repeats']} times, all but the first from pointmaps changed by a millionth, as another "
                  "machine's rounding would: median (least to most). A ratio whose range is wide is a matter of chance "
                  "in that room.", "",
                  "| room | bad pairs | plain ATE, m | robust / plain: ATE | points "
                  "| robust, verified / plain: ATE | points | AUC of w | AUC of C |",
                  "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for number, row in enumerate(result["core"]):
            cells = [_range(row, name) for name in _RATIOS]
            lines.append(f"| {number} | {row['bad_edges']:.0%} | {row['ate']:.4f} | {' | '.join(cells)} | "
                         f"{row['auc_w']:.2f} | {row['auc_c']:.2f} |")  # fmt: skip
        lines += ["", f"Median ATE ratio {np.median(column['ate_ratio']):.2f} (bar 0.6), points "
                  f"{np.median(column['point_ratio']):.2f} (bar 0.7), worst ATE {max(column['ate_ratio']):.2f} "
                  f"(bar 1.25), AUC {np.median(column['auc_w']):.2f} (bar 0.7) where raw confidence has "
                  f"{np.median(column['auc_c']):.2f}. With the pairs left out whose pictures contradict each other: "
                  f"ATE {np.median(column['verified_ratio']):.2f}, points "
                  f"{np.median(column['verified_point_ratio']):.2f}."]  # fmt: skip
    if result["exact"]:
        lines += [f"Without errors in the pointmaps: ATE {result['exact']['plain']:.1e} (plain) and "
                  f"{result['exact']['robust']:.1e} (robust) of the scene's size (bar 1e-3)."]  # fmt: skip
    if result["encodings"]:
        row = result["encodings"]
        lines += ["", "## Encoder calls", "",
                  f"{row['pictures']} pictures, {row['pairs']} ordered pairs: {row['calls']} encodings, "
                  f"{row['cached_cpu']} CPU seconds; pair by pair {row['direct_calls']} encodings, "
                  f"{row['direct_cpu']} CPU seconds."]  # fmt: skip
    return lines
