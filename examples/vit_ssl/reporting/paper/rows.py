"""Which of our results belongs in which cell of the paper's tables, and which of their rows is like our checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from config.recipe import Recipe
from reporting.paper.tables import (
    ABLATION,
    FEW_SHOT,
    FINE_TUNING,
    IMAGENET,
    RETRIEVAL,
    TABLES,
    TRANSFER,
    UTILISATION,
    VIDEO,
)

Row = Mapping[str, Any]


class Source(NamedTuple):
    """Where a cell comes from: the last row of results.jsonl with this protocol and metric, on these data."""

    protocol: str
    metric: str
    data: str = ""  # a word in the name of the data's folder; empty: whatever it is called
    scale: float = 100.0  # per cent; 1 for counts


_PER_CLASS = {"Aircraft", "Caltech101", "Flowers", "Pets"}  # Ericsson et al. (2021): the mean accuracy per class
_WORDS = {"Flowers": "flower", "Pets": "pet", "SUN397": "sun", "Food": "food"}  # others: their name in lower case


def _of_small_sets(protocol: str, names: Iterable[str], per_class: set[str]) -> dict[str, Source]:
    return {
        name: Source(protocol, "per_class" if name in per_class else "top1", _WORDS.get(name, name.lower()))
        for name in names
    }


SOURCES: dict[str, dict[str, Source]] = {
    ABLATION.number: {"kNN": Source("knn", "top1")},
    IMAGENET.number: {
        "kNN": Source("knn", "top1"),
        "Lin. [C]": Source("linear", "top1_C"),
        "Lin. [D]": Source("linear", "top1_D"),
    },
    FEW_SHOT.number: {
        "1 img/cls": Source("fewshot", "1-shot"),
        "2 imgs/cls": Source("fewshot", "2-shot"),
        "5 imgs/cls": Source("fewshot", "5-shot"),
        "1% imgs": Source("fewshot", "1percent"),
    },
    UTILISATION.number: {
        "unique prototypes": Source("prototypes", "unique", scale=1),
        "largest duplicate set": Source("prototypes", "largest_set", scale=1),
    },
    TRANSFER.number: _of_small_sets("transfer", TRANSFER.columns[:-1], _PER_CLASS),
    RETRIEVAL.number: {
        f"{short} {level[0].upper()}": Source("retrieval", f"{name}_{level}_mAP")
        for short, name in (("RPar", "rparis6k"), ("ROx", "roxford5k"))
        for level in ("medium", "hard")
    },
    VIDEO.number: {column: Source("video", column.replace(" mean", "-Mean")) for column in VIDEO.columns},
    FINE_TUNING.number: _of_small_sets("finetune", FINE_TUNING.columns, {"Aircraft"}),
}
"""The key is the table's number and its column."""

HOW: dict[str, str] = {
    ABLATION.number: "the six cells are six pretrainings, a recipe with `--set normalization=... centering=...`",
    IMAGENET.number: "`evaluate.py knn --data IMAGENET` and `evaluate.py linear --augment --data IMAGENET`",
    FEW_SHOT.number: "`evaluate.py fewshot --splits DIR --no-final-norm --data IMAGENET` with MSN's lists in DIR",
    UTILISATION.number: "`evaluate.py prototypes`, for a run of pretrain.py or a .pth file with its head",
    TRANSFER.number: "`evaluate.py transfer --split test --data DIR` for each data set, whose name is in that of DIR",
    RETRIEVAL.number: "`evaluate.py retrieval --data DIR` with DIR/roxford5k and DIR/rparis6k",
    VIDEO.number: "`evaluate.py video --data DAVIS`",
    FINE_TUNING.number: "`evaluate.py finetune --data IMAGENET`, and `evaluate.py finetune-small --data DIR` for each "
    "other data set, whose name is in that of DIR",
}
"""The commands that fill a table, by its number."""


def find(rows: Sequence[Row], source: Source) -> Row | None:
    """Return the last row of pretrained features that the source describes."""
    for row in reversed(rows):
        word = re.sub(r"[^a-z0-9]", "", data_name(row).lower())
        # "cifar10" is in "cifar100", too.
        on_data = source.data in word and not (source.data == "cifar10" and "cifar100" in word)
        if on_data and (row["protocol"], row["metric"]) == source[:2] and row.get("features", "teacher") == "teacher":
            return row
    return None


def data_name(row: Row) -> str:
    """Return the last part of the path of the data, or the name of a data set."""
    return Path(row.get("data", "")).name


def is_imagenet(row: Row) -> bool:
    """Return whether a row was measured on ImageNet-1K: by the name of the folder, or by the size of its validation
    split.
    """
    return "imagenet" in data_name(row).lower() or row.get("n") == 50_000


def paper_row_of(recipe: Recipe) -> str | None:
    """Return the name that the paper would give such a model, "ViT-S/16 DINO-vMF"; None where it has no such model."""
    shape = (recipe.backbone, recipe.hidden_size, recipe.num_hidden_layers, recipe.num_attention_heads)
    size = {("vit", 384, 12, 6): "S", ("vit", 768, 12, 12): "B"}.get(shape)
    vmf = recipe.normalization == "vmf"
    method = {"dino": "DINO", "ibot": "iBOT", "msn": "MSN"}[recipe.method] + ("-vMF" if vmf else "")
    as_published = recipe.method == "msn" or (recipe.centering == "probability") == vmf
    name = f"ViT-{size}/{recipe.patch_size} {method}"
    return name if as_published and name in row_names() else None


def ablation_row(recipe: Recipe) -> str | None:
    """Return the cell of Table 1 that the recipe repeats, such as "vmf, probability", or None."""
    same = (recipe.method, recipe.backbone, recipe.hidden_size, recipe.num_hidden_layers)
    same += (recipe.patch_size, recipe.epochs)
    return f"{recipe.normalization}, {recipe.centering}" if same == ("dino", "vit", 384, 12, 16, 100) else None


def row_names() -> list[str]:
    """Return all models of the paper's tables."""
    return list(dict.fromkeys(name for table in TABLES for name in table.rows if table is not ABLATION))


def check_paper_row(name: str | None) -> None:
    """Raise ValueError unless the paper has a row of that name (or None is asked for)."""
    if name is not None and name not in row_names():
        raise ValueError(f"`paper_row` (={name!r}) must be one of {', '.join(row_names())}")
