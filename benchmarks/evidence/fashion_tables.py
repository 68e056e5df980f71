"""Tables of the runs on Fashion-MNIST."""

from typing import Any

from benchmarks.evidence.summary import select, table, text

BASELINE = "none, logit"


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


def by_fifth(result: dict[str, Any]) -> str:
    """Figure 2 of the paper: kNN of the images whose component has the lowest kappa, ..., the highest."""
    rows = result["rows"]
    header = (
        "normalisation, centre",
        *("lowest κ", "2", "3", "4", "highest κ"),
        "highest − lowest",
        "rank correlation",
    )
    lines = []
    for arm in _arms(rows):
        own = select(rows, arm=arm)
        if own[0]["normalization"] == "l2":
            continue  # every kappa is the same
        fifths = [text([row["knn_by_fifth"][i] for row in own], scale=100, digits=1) for i in range(5)]
        rise = text([row["knn_by_fifth"][4] - row["knn_by_fifth"][0] for row in own], scale=100, digits=1, signed=True)
        lines.append((arm, *fifths, rise, text([row["rank_correlation_accuracy"] for row in own], signed=True)))
    return table(header, lines)


def _arms(rows: list[dict[str, Any]]) -> list[str]:
    order = ("none, logit", "none, probability", "L2, logit", "L2, probability", "vMF, logit")
    found = dict.fromkeys(row["arm"] for row in rows)
    return sorted(found, key=lambda arm: order.index(arm) if arm in order else len(order))
