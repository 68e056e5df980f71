"""What the page of an evaluation leads with: our numbers, in the words of somebody who does not know the paper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evaluators.ood.scores import IN_WORDS
from reporting.several_runs.comparison import Difference, sentence

Row = Mapping[str, Any]
MODELS = {"pixels": "raw pixels", "random": "a random network", "teacher": "this model"}
WORDS = {
    ("knn", "top1"): "kNN",
    ("linear", "top1"): "linear probe",
    ("linear", "top1_C"): "linear probe on [CLS]",
    ("linear", "top1_D"): "linear probe as DINO's",
    ("attentive", "top1"): "attentive probe",
    ("fewshot", "1percent"): "1 % of the labels",
    ("transfer", "top1"): "linear probe, cross-validated",
    ("transfer", "per_class"): "the same, mean over classes",
    ("finetune", "top1"): "fine-tuned",
    ("finetune", "per_class"): "fine-tuned, mean over classes",
}
OOD_MEASURES = {"auroc": "AUROC", "fpr95": "FPR95"}
OOD_NOTE = (
    "How well each score tells the evaluated images from others. AUROC is the probability that an image of the data "
    "has the higher score: 100 is perfect, 50 is chance. FPR95 is the share of the images of the data that are "
    "rejected when 95 % of the others are: 0 is perfect (both as in OpenOOD). Difficulty is the rank correlation, from "
    "−1 to 1, of the score with whether kNN is right. All scores were fitted to train images alone."
)
CLUSTERS_NOTE = (
    "How well clusters of the train images agree with the classes of the evaluated ones: normalised mutual information "
    "(NMI) and adjusted Rand index (ARI), 100 where they are the same. NMI rises with the number of clusters, so "
    "compare lines with equal numbers. ±: the deviation over starts of k-means."
)
ROBUSTNESS_NOTE = (
    "One linear probe, trained once. On a set of some of the classes it chooses among these; the last column is this "
    "model on the evaluated images of the same classes. A corruption's number is the mean over its severities, and its "
    "standard error at most what ± says."
)
SEGMENTATION = {
    "knn_mIoU": "patch kNN: mIoU, %",
    "knn_pixel_accuracy": "pixels right, %",
    "linear_mIoU": "linear head: mIoU, %",
    "linear_pixel_accuracy": "pixels right, %",
}
SEGMENTATION_NOTE = (
    "mIoU: of the pixels that a class has or is given, the share that both agree on, over all images, as the mean over "
    "classes. Whether patch features know more than the colours of a patch is seen beside `--features pixels`, and "
    "whether they were learned beside `--features random`."
)
COMPARE = "compare"
"""The protocol of rows that hold a difference between two models."""


class OwnTable(NamedTuple):
    """A table of the page, its head first, and what can be said about it."""

    title: str
    lines: list[list[str]]
    notes: list[str]


def own_tables(rows: Sequence[Row], checkpoint: str) -> list[OwnTable]:
    """Return a table of accuracies for each data set and split, of the prototypes, of segmentation, of clusters, and of
    other data; none without numbers.

    `rows` are those of results.jsonl for this checkpoint; of several for one cell the last counts.
    """
    places = dict.fromkeys((row.get("data", ""), row["split"]) for row in rows if _column(row))
    tables = [
        _accuracies([row for row in rows if (row.get("data", ""), row["split"]) == place], place, checkpoint)
        for place in places
    ]
    tables += _prototypes({row["metric"]: row["value"] for row in rows if row["protocol"] == "prototypes"})
    tables += _segmentation([row for row in rows if row["protocol"] == "segmentation"])
    tables += _clusters([row for row in rows if row["protocol"] == "clustering"])
    tables += _robustness([row for row in rows if row["protocol"] == "robustness"])
    return tables + _out_of_distribution([row for row in rows if row["protocol"] == "ood"])


def difference_row(difference: Difference) -> tuple[str, float, dict[str, Any]]:
    """Return name, value and options of the metric that results.jsonl keeps of a difference."""
    a, b, protocol, value, error = difference
    return f"{protocol} minus {b}", value, {"a": a, "b": b, "of": protocol, "se": error}


def _accuracies(rows: Sequence[Row], place: tuple[str, str], checkpoint: str) -> OwnTable:
    cells = {(row.get("features", "teacher"), column): _cell(row) for row in rows if (column := _column(row))}
    columns = list(dict.fromkeys(column for _, column in cells))
    models = [features for features in MODELS if any(features == other for other, _ in cells)]
    lines = [["", *(f"{column}, %" for column in columns)]]
    lines += [[MODELS[name], *(cells.get((name, column), "–") for column in columns)] for name in models]
    compared = {row["metric"]: row for row in rows if row["protocol"] == COMPARE}
    said = [
        sentence(Difference("this model", row["b"], row["of"], row["value"], row["se"])) for row in compared.values()
    ]
    notes = [f"{text[0].upper()}{text[1:]}." for text in said]
    if not compared:
        notes.append(f"Whether it is better than raw pixels: `evaluate.py compare {checkpoint}`.")
    data, split = place
    counts = sorted({row["n"] for row in rows if _column(row) and row.get("n")})
    size = f"{counts[0]} " if len(counts) == 1 else ""
    return OwnTable(f"Accuracy on {size}{split} images{f' of {Path(data).name}' if data else ''}", lines, notes)


def _prototypes(counted: Mapping[str, Any]) -> list[OwnTable]:
    if "prototypes" not in counted:
        return []
    total = counted["prototypes"]
    words = {
        "used_targets": "are the target of some train image",
        "used_logits": "are the most probable one of some train image",
        "unique": "are no duplicates of each other (cosine above 0.9)",
    }
    lines = [["of the prototypes", ""]]
    lines += [[text, f"{counted[name]} of {total}"] for name, text in words.items() if name in counted]
    if "kappa_p05" in counted:
        quantiles = (counted[f"kappa_{name}"] for name in ("p05", "p50", "p95"))
        lines.append(["have κ (5 %, median, 95 %)", ", ".join(f"{value:.3g}" for value in quantiles)])
    return [OwnTable("Prototypes", lines, [])]


def _segmentation(rows: Sequence[Row]) -> list[OwnTable]:
    tables = []
    for data, split in dict.fromkeys((row.get("data", ""), row["split"]) for row in rows):
        own = [row for row in rows if (row.get("data", ""), row["split"]) == (data, split)]
        cells = {(row.get("features", "teacher"), row["metric"]): f"{100 * row['value']:.1f}" for row in own}
        metrics = [metric for metric in SEGMENTATION if any(metric == other for _, other in cells)]
        lines = [["", *(SEGMENTATION[metric] for metric in metrics)]]
        for features, name in MODELS.items():
            if any(features == other for other, _ in cells):
                lines.append([name, *(cells.get((features, metric), "–") for metric in metrics)])
        title = f"Segmentation of {own[-1]['n']} {split} images{f' of {Path(data).name}' if data else ''}"
        tables.append(OwnTable(title, lines, [SEGMENTATION_NOTE]))
    return tables


def _clusters(rows: Sequence[Row]) -> list[OwnTable]:
    last, place = _last(rows)
    lines = [["", "clusters", "NMI, %", "ARI, %"]]
    for features, metric in last:
        kind = metric.removeprefix("nmi_")
        if kind != metric and (features, f"ari_{kind}") in last:
            what = "its prototypes" if kind == "prototypes" else "k-means"
            pair = [last[features, f"{measure}_{kind}"] for measure in ("nmi", "ari")]
            cells = [_value(row) + (f" ± {100 * row['sd']:.1f}" if "sd" in row else "") for row in pair]
            lines.append([f"{MODELS[features]}, {what}", str(pair[0]["clusters"]), *cells])
    return [OwnTable(f"Clusters and classes, {place}", lines, [CLUSTERS_NOTE])] if rows else []


def _robustness(rows: Sequence[Row]) -> list[OwnTable]:
    last, place = _last(rows)
    models = list(dict.fromkeys(features for features, _ in last))
    lines = [["", "classes", *(f"{MODELS[features]}, %" for features in models), "same classes, clean"]]
    for metric in dict.fromkeys(metric for _, metric in last):
        of_models = [last.get((features, metric)) for features in models]
        classes = next(row for row in of_models if row).get("classes", "")
        clean = last.get(("teacher", metric), {}).get("clean")
        measure, _, name = metric.partition("@")
        name = name.replace("/", ", ") or "the evaluated images"
        name += " (mean corruption error; AlexNet: 100)" if measure == "mce" else ""
        show = _value if measure == "mce" else _cell
        cells = [show(row) if row else "–" for row in of_models]
        lines.append([name, str(classes), *cells, "" if clean is None else f"{100 * clean:.1f}"])
    return [OwnTable(f"Robustness, {place}", lines, [ROBUSTNESS_NOTE])] if rows else []


def _last(rows: Sequence[Row]) -> tuple[dict[tuple[str, str], Row], str]:
    """Return by model, pixels first, and metric the last row of each on the last row's images, and these in words."""
    if not rows:
        return {}, ""
    data, split = rows[-1].get("data", ""), rows[-1]["split"]
    here = [row for row in rows if (row.get("data", ""), row["split"]) == (data, split)]
    here.sort(key=lambda row: list(MODELS).index(row.get("features", "teacher")))  # which keeps their order otherwise
    found = {(row.get("features", "teacher"), row["metric"]): row for row in here}
    return found, f"{split} images{f' of {Path(data).name}' if data else ''}"


def _out_of_distribution(rows: Sequence[Row]) -> list[OwnTable]:
    found = [row for row in rows if row.get("features", "teacher") == "teacher"]
    if not found:
        return []
    data, split = found[-1].get("data", ""), found[-1]["split"]
    last = {row["metric"]: row for row in found if (row.get("data", ""), row["split"]) == (data, split)}
    of_score = {row["score"]: row for row in last.values()}
    sets = {row["out"]: row["kind"] for row in last.values() if "out" in row}
    titles = [f"{title}, {_named(name, kind)}" for name, kind in sets.items() for title in OOD_MEASURES.values()]
    lines = [["", *titles, "difficulty", "chosen"]]
    for score, row in of_score.items():
        metrics = [f"{measure}_{score}@{name}" for name in sets for measure in OOD_MEASURES]
        cells = [f"{100 * last[metric]['value']:.1f}" if metric in last else "–" for metric in metrics]
        difficulty = last.get(f"difficulty_{score}")
        cells.append("–" if difficulty is None else f"{difficulty['value']:+.2f}")
        settings = ", ".join(f"{key} {row[key]:g}" for key in ("k", "components", "C") if key in row)
        lines.append([IN_WORDS[score], *cells, settings])
    return [
        OwnTable(f"Out of distribution, {split} images{f' of {Path(data).name}' if data else ''}", lines, [OOD_NOTE])
    ]


def _named(name: str, kind: str) -> str:
    if name == kind:
        return f"mean of {kind} sets"
    return name if kind == "out" else f"{name} ({kind})"


def _column(row: Row) -> str:
    if row["protocol"] == "fewshot" and row["metric"].endswith("-shot"):
        return f"{row['metric'].removesuffix('-shot')} labels a class"
    return WORDS.get((row["protocol"], row["metric"]), "")


def _value(row: Row) -> str:
    return f"{100 * row['value']:.1f}"


def _cell(row: Row) -> str:
    value, n = row["value"], row.get("n")
    error = row["sd"] if "sd" in row else math.sqrt(value * (1 - value) / n) if n else None
    return _value(row) + ("" if error is None else f" ± {100 * error:.1f}")
