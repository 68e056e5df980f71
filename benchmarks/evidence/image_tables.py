"""Tables of the runs on real images, Fashion-MNIST and the photographs."""

import math
import statistics
from typing import Any

from benchmarks.evidence.mixture_tables import COLLAPSED
from benchmarks.evidence.summary import select, table, text
from benchmarks.fashion.train import Settings

BASELINE = "none, logit"
PAIRS = (
    ("vMF, responsibilities", "none, probability"),
    ("none, probability", "none, logit"),
    ("L2, probability", "L2, logit"),
    ("vMF, responsibilities", "vMF, logit"),
    ("vMF, responsibilities", "vMF, scores"),
)
"""What the constant changes, what the place of the centre changes within each normalisation, and its reading."""


def table_1(result: dict[str, Any]) -> str:
    """Table 1 of the paper: kNN of every cell, paired by seed with plain DINO."""
    rows = result["rows"]
    baseline = {row["seed"]: row["knn"] for row in select(rows, arm=BASELINE)}
    header = (
        "normalisation, centre",
        "seeds",
        "kNN, %",
        "minus plain DINO, points",
        "used: scores",
        "logits",
        "targets",
        "κ₉₅ / κ₅",
    )
    untrained = result["untrained_knn"]
    lines = [
        ("raw pixels", "", f"{100 * result['raw_pixels_knn']:.2f}", *[""] * 5),
        ("before training", str(len(untrained)), text(untrained, scale=100), *[""] * 5),
    ]
    for arm in _arms(rows):
        own = select(rows, arm=arm)
        paired = [row["knn"] - baseline[row["seed"]] for row in own if row["seed"] in baseline]
        difference = "" if arm == BASELINE else text(paired, scale=100, signed=True)
        used = [text([row[f"used_by_{name}"] for row in own]) for name in ("scores", "logits", "targets")]
        spread = text([row["kappa_spread"] for row in own])
        lines.append((arm, str(len(own)), text([row["knn"] for row in own], scale=100), difference, *used, spread))
    return table(header, lines)


def pairs(result: dict[str, Any]) -> str:
    """Differences of kNN between two cells, paired by seed, with the standard error of their mean."""
    lines = []
    for one, other in PAIRS:
        ours, theirs = ({row["seed"]: row["knn"] for row in select(result["rows"], arm=arm)} for arm in (one, other))
        seeds = sorted(ours.keys() & theirs.keys())
        difference = text([ours[seed] - theirs[seed] for seed in seeds], scale=100, signed=True)
        lines.append((one, other, str(len(seeds)), difference))
    return table(("", "minus", "seeds", "kNN, points"), lines)


def by_fifth(result: dict[str, Any]) -> str:
    """Figure 2 of the paper: kNN of the images whose component has the lowest kappa, ..., the highest."""
    rows = result["rows"]
    header = (
        "normalisation, centre",
        *("lowest κ", "2", "3", "4", "highest κ"),
        "highest − lowest",
    )
    ranked = "rank_correlation_accuracy" in rows[0]
    header += ("rank correlation",) if ranked else ()
    lines = []
    for arm in _arms(rows):
        own = select(rows, arm=arm)
        if own[0]["normalization"] == "l2":
            continue  # every kappa is the same
        fifths = [text([row["knn_by_fifth"][i] for row in own], scale=100, digits=1) for i in range(5)]
        both = [(row["knn_by_fifth"][0], row["knn_by_fifth"][4]) for row in own]
        rises = [None if None in ends else ends[1] - ends[0] for ends in both]
        rise = text(rises, scale=100, digits=1, signed=True)
        rank = [text([row["rank_correlation_accuracy"] for row in own], signed=True)] if ranked else []
        lines.append((arm, *fifths, rise, *rank))
    return table(header, lines)


def stability(result: dict[str, Any]) -> str:
    """One line per invitation to trouble: prototypes in use, largest rise of the loss, largest norm, kNN; failures."""
    arms = list(dict.fromkeys(row["arm"] for row in result["rows"]))
    lines = []
    for change in dict.fromkeys(change_of(row) for row in result["rows"]):
        rows = [row for row in result["rows"] if change_of(row) == change]
        own = [select(rows, arm=arm) for arm in arms]
        seeds = "–".join(str(n) for n in sorted({len(rows) for rows in own}))
        lines.append((change, seeds, *map(_outcome, own)))
    return table(("change", "seeds", *arms), lines)


def change_of(row: dict[str, Any]) -> str:
    """What differs from the settings of Table 1, but for the number of steps, in words."""
    words = {
        "lr": "lr {:g}",
        "clip": "no clipping",
        "norm_speed": "norms × {:g}",
        "head_layers": "head of {} layers",
        "batch": "batch {}",
        "prototypes": "K {}",
        "precision": "{}",
    }
    defaults = Settings()
    return ", ".join(w.format(row[name]) for name, w in words.items() if row[name] != getattr(defaults, name)) or "none"


def _outcome(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "–"
    whole = select(rows, finite=True)
    failed = [f"**{len(rows) - len(whole)} not finite**"] if len(whole) < len(rows) else []
    collapsed = sum(row["marginal_entropy"] < COLLAPSED for row in whole)
    failed += [f"**{collapsed} collapsed**"] if collapsed else []
    used, rise, norm, knn = (
        statistics.fmean(row[name] for row in whole) if whole else math.nan
        for name in ("used_by_logits", "spike", "largest_norm", "knn")
    )
    numbers = [f"{used:.2f}, {rise:.2f}, {norm:.1f}, {100 * knn:.1f}".replace("-", "−")] if whole else []
    return ", ".join([*numbers, *failed])


def _arms(rows: list[dict[str, Any]]) -> list[str]:
    order = ("none, logit", "none, probability", "L2, logit", "L2, probability", "vMF, logit")
    found = dict.fromkeys(row["arm"] for row in rows)
    return sorted(found, key=lambda arm: order.index(arm) if arm in order else len(order))
