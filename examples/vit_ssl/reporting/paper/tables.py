"""The numbers that the paper prints, to stand beside ours: tables 1 to 7 and 12 to 15 of Govindarajan et al. (2023).

Rows are called "ARCHITECTURE METHOD". Accuracies, mAP, J and F are in per cent. None: the paper has no number there, or
(some deviations of Table 12) the text of it that this file was typed from lost it.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

Number: TypeAlias = float | None


class PaperTable(NamedTuple):
    """A table of the paper; `deviations` (over three training sets) has the same keys and columns as `rows`."""

    number: str
    title: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[Number, ...]]
    deviations: dict[str, tuple[Number, ...]] = {}  # noqa: RUF012 (never changed)
    digits: int = 1  # behind the point


ABLATION = PaperTable(
    "1",
    "kNN on ImageNet, prototype normalisation by centring; ViT-S/16, 100 epochs, mean of two runs",
    ("kNN",),
    {
        "none, logit": (70.18,),
        "none, probability": (70.49,),
        "l2, logit": (69.51,),
        "l2, probability": (69.86,),
        "vmf, logit": (70.21,),
        "vmf, probability": (70.87,),
    },
    digits=2,
)

IMAGENET = PaperTable(
    "2",
    "kNN and linear classification on ImageNet; [C]: of [CLS], [D]: DINO's protocol",
    ("kNN", "Lin. [C]", "Lin. [D]"),
    {
        "ViT-B/16 iBOT": (77.10, 79.33, 79.50),
        "ViT-B/16 iBOT-vMF": (78.66, 80.20, 80.27),
        "ViT-B/16 DINO": (76.11, 77.88, 78.17),
        "ViT-B/16 DINO-vMF": (77.40, 78.67, 78.81),
        "ViT-B/16 BeIT-v2": (None, None, 80.10),
        "ViT-B/16 MSN": (73.33, 75.84, 74.80),
        "ViT-S/16 DINO": (74.44, 76.09, 76.98),
        "ViT-S/16 DINO-vMF": (74.74, 76.19, 76.97),
        "ViT-S/16 MSN": (74.86, 76.20, 76.62),
        "ViT-S/16 iBOT": (75.20, None, 77.90),
    },
    digits=2,
)

FEW_SHOT = PaperTable(
    "3",
    "Few-shot classification on ImageNet, as in MSN; Tables 12 and 13 for the deviations over three training sets",
    ("1 img/cls", "2 imgs/cls", "5 imgs/cls", "1% imgs"),
    {
        "ViT-B/16 DINO": (41.8, 51.9, 61.4, 67.2),
        "ViT-B/16 MSN": (49.8, 58.9, 65.5, 69.1),
        "ViT-B/16 DINO-vMF": (50.3, 59.3, 66.1, 70.4),
        "ViT-B/16 iBOT": (46.0, 56.0, 64.7, 69.9),
        "ViT-B/16 iBOT-vMF": (51.6, 61.1, 68.3, 72.3),
        "ViT-S/16 DINO": (38.9, 48.9, 58.5, 64.5),
        "ViT-S/16 MSN": (47.1, 55.8, 62.8, 67.2),
        "ViT-S/16 DINO-vMF": (39.2, 49.4, 59.1, 65.0),
    },
    {
        "ViT-B/16 DINO": (None, 0.6, None, None),
        "ViT-B/16 MSN": (0.2, 0.4, 0.3, None),
        "ViT-B/16 DINO-vMF": (None, 0.4, None, None),
        "ViT-B/16 iBOT": (None, 0.8, None, None),
        "ViT-B/16 iBOT-vMF": (0.1, 0.7, 0.3, None),
        "ViT-S/16 DINO": (0.4, 0.3, 0.1, None),
        "ViT-S/16 MSN": (0.1, 0.6, 0.3, None),
        "ViT-S/16 DINO-vMF": (0.6, 0.7, 0.2, None),
    },
)

UTILISATION = PaperTable(
    "4",
    "Prototypes in use, of 65536, at a cosine threshold of 0.9",
    ("unique prototypes", "largest duplicate set"),
    {
        "ViT-S/16 DINO": (961, 2087),
        "ViT-S/16 DINO-vMF": (1122, 1226),
        "ViT-B/16 DINO": (775, 54877),
        "ViT-B/16 DINO-vMF": (928, 1208),
    },
    digits=0,
)

TRANSFER = PaperTable(
    "5",
    "Linear classification, transferred to small data sets",
    ("Aircraft", "Caltech101", "CIFAR10", "CIFAR100", "DTD", "Flowers", "Food", "Pets", "SUN397", "average"),
    {
        "ViT-B/16 DINO": (57.7, 94.5, 96.9, 86.3, 74.8, 96.0, 81.6, 93.9, 68.5, 83.4),
        "ViT-B/16 DINO-vMF": (57.3, 94.5, 97.1, 86.3, 74.8, 95.7, 82.5, 94.6, 68.7, 83.5),
        "ViT-B/16 iBOT": (55.9, 94.7, 97.6, 87.4, 74.4, 95.4, 82.7, 93.8, 69.4, 83.5),
        "ViT-B/16 iBOT-vMF": (58.1, 95.5, 98.0, 88.0, 74.7, 94.8, 83.6, 93.9, 70.2, 84.1),
        "ViT-B/16 MSN": (51.0, 92.8, 96.9, 85.3, 73.7, 92.8, 80.0, 93.9, 66.8, 81.5),
        "ViT-S/16 DINO": (53.8, 93.1, 96.2, 83.5, 74.7, 94.7, 79.7, 93.8, 66.8, 81.8),
        "ViT-S/16 DINO-vMF": (56.0, 93.7, 96.0, 83.9, 74.1, 95.0, 80.1, 93.9, 66.6, 82.1),
        "ViT-S/16 MSN": (51.6, 93.1, 95.9, 82.9, 72.0, 93.3, 77.8, 92.8, 65.5, 80.5),
    },
)

RETRIEVAL = PaperTable(
    "6",
    "Image retrieval, mAP on revisited Paris and Oxford with medium (M) and hard (H) positives",
    ("RPar M", "RPar H", "ROx M", "ROx H"),
    {
        "ViT-B/16 DINO": (63.7, 35.8, 34.3, 10.8),
        "ViT-B/16 DINO-vMF": (66.7, 39.5, 37.3, 12.5),
        "ViT-B/16 iBOT": (64.1, 36.6, 35.2, 13.4),
        "ViT-B/16 iBOT-vMF": (65.4, 38.1, 38.1, 13.8),
        "ViT-B/16 MSN": (56.3, 29.3, 31.8, 11.8),
        "ViT-S/16 DINO": (63.1, 34.5, 34.6, 13.0),
        "ViT-S/16 DINO-vMF": (62.1, 33.4, 34.5, 12.6),
        "ViT-S/16 MSN": (61.5, 33.3, 36.6, 15.1),
    },
)

VIDEO = PaperTable(
    "7",
    "Video object segmentation on DAVIS-2017",
    ("J&F mean", "J mean", "F mean"),
    {
        "ViT-B/16 DINO": (62.4, 60.8, 64.0),
        "ViT-B/16 DINO-vMF": (63.4, 61.6, 65.2),
        "ViT-B/16 iBOT": (62.7, 61.8, 63.7),
        "ViT-B/16 iBOT-vMF": (63.1, 61.9, 64.2),
        "ViT-B/16 MSN": (58.0, 56.1, 60.0),
        "ViT-S/16 DINO": (61.8, 60.2, 63.4),
        "ViT-S/16 DINO-vMF": (62.7, 60.9, 64.5),
        "ViT-S/16 MSN": (59.6, 57.6, 61.6),
    },
)

FINE_TUNING = PaperTable(
    "14, 15",
    "Fine-tuning after pretraining on ImageNet; Aircraft: mean accuracy per class",
    ("CIFAR10", "CIFAR100", "Flowers", "Aircraft", "ImageNet"),
    {
        "ViT-S/16 Random (DeIT)": (99.0, 89.5, 98.2, None, 79.9),
        "ViT-S/16 Random (DeIT-III)": (None, None, None, None, 81.4),
        "ViT-S/16 BeIT": (98.6, 87.4, 96.4, None, None),
        "ViT-S/16 DINO": (99.0, 90.5, 98.5, 84.2, 82.0),
        "ViT-S/16 DINO-vMF": (99.0, 90.7, 98.7, 85.0, 81.8),
        "ViT-S/16 iBOT": (99.1, 90.7, 98.6, 85.7, 82.3),
        "ViT-B/16 Random (DeIT)": (99.0, 90.8, 98.4, None, 81.8),
        "ViT-B/16 Random (DeIT-III)": (None, None, None, None, 83.8),
        "ViT-B/16 BeIT": (99.0, 90.1, 98.0, None, 83.4),
        "ViT-B/16 DINO": (99.1, 91.7, 98.8, 84.5, 83.6),
        "ViT-B/16 DINO-vMF": (99.2, 91.9, 98.9, 84.8, 83.6),
        "ViT-B/16 iBOT": (99.2, 92.2, 98.9, 85.1, 84.0),
        "ViT-B/16 iBOT-vMF": (99.2, 92.6, 98.8, 85.8, 84.1),
        "ViT-B/16 MAE": (None, None, None, None, 83.6),
    },
)

TABLES = (ABLATION, IMAGENET, FEW_SHOT, UTILISATION, TRANSFER, RETRIEVAL, VIDEO, FINE_TUNING)
