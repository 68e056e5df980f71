"""What came out of a demo, in words: use of the prototypes, concentrations, then accuracies, and no more than that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reporting.demo_table import RUNS, Row, sentence

MOVED = 1.2
"""From this factor between the 95 % and the 5 % quantile on, the concentrations are said to differ."""
SIMILAR = 1.5
"""Up to this factor, two runs are said to use similarly many prototypes."""


def story(results: Mapping[str, Any]) -> dict[str, str]:
    """Return what a demo's `results` say about "use", "kappa", kNN "by_kappa" and "accuracy", in this order."""
    table = [row for row in results["table"] if row["model"] in RUNS]
    by_kappa = {label: accuracy_by_kappa(results["evaluations"][run]) for label, run in RUNS.items()}
    pairs = [pair for pair in results["knn_comparisons"] if pair["a"] == "DINO-vMF"]
    return {
        "use": use(table),
        "kappa": f"{spread(table)} {speeds(results['recipes'])}".strip(),
        "by_kappa": rise(by_kappa),
        "accuracy": " ".join(sentence(pair) for pair in pairs),
    }


def use(table: Sequence[Row]) -> str:
    """Return how many prototypes the targets of the two runs choose."""
    (few, fewest), (many, most) = sorted(((row["model"], row["used by targets"]) for row in table), key=lambda x: x[1])
    counts = ", ".join(f"{row['model']} {row['used by targets']} of {row['prototypes']}" for row in table)
    found = f"Prototypes that are the largest target of some training image: {counts}."
    if most <= SIMILAR * fewest:
        return f"{found} The two use similarly many."
    return f"{found} {many} uses {most / max(fewest, 1):.1f} times as many as {few}."


def spread(table: Sequence[Row]) -> str:
    """Return how far the concentrations of each run have moved apart."""
    found = []
    for row in table:
        low, high = row["κ 5–95 %"]
        factor = high / low if low > 0 else float("inf")
        words = f"a factor {factor:.1f}" if factor >= MOVED else f"a factor {factor:.2f}: they have hardly moved"
        found.append(f"{row['model']} {low:.1f} to {high:.1f} ({words})")
    return f"κ = ‖w‖/τ of the middle 90 % of the prototypes: {'; '.join(found)}."


def speeds(recipes: Mapping[str, Mapping[str, Any]]) -> str:
    """Return how fast the norms of each run learn, where that differs: it is a reason for a difference in spread."""
    found = {label: recipes[run]["norms_lr_multiplier"] for label, run in RUNS.items()}
    if len(set(found.values())) == 1:
        return ""
    words = (f"{label}'s {f'{speed:g} times as fast' if speed else 'as fast'}" for label, speed in found.items())
    return f"The norms learn at different rates, {', '.join(words)} as the directions: spreads cannot be compared."


def accuracy_by_kappa(rows: Sequence[Row]) -> list[Row]:
    """Return the ranges of kappa of one run's evaluations, from the lowest: `value`, `n`, `standard_error`."""
    # Later rows replace earlier ones: an evaluation that was interrupted has been repeated.
    found = {row["metric"]: row for row in rows if row["metric"].startswith("top1@kappa_")}
    return sorted(found.values(), key=lambda row: row["kappa_low"])


def rise(by_kappa: Mapping[str, Sequence[Row]]) -> str:
    """Return kNN by ranges of kappa, lowest first, without a verdict: a demo has too few images for one."""
    shown = {label: [f"{100 * row['value']:.0f}" for row in rows] for label, rows in by_kappa.items() if rows}
    if not shown:
        return "No accuracy can be given by κ, because all κ are still equal."
    accuracies = "; ".join(f"{label} {' '.join(values)}" for label, values in shown.items())
    largest = max(row["standard_error"] for rows in by_kappa.values() for row in rows)
    return (
        f"kNN of the test images from the lowest κ to the highest, per cent: {accuracies}. Each number has a standard "
        f"error of up to {100 * largest:.0f} points over images, and images of one component come from few "
        "photographs: too few to show a trend."
    )
