"""docs/images/mixture_ood.svg: how well each score tells the data from other images."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ood.images import NEAR
from benchmarks.ood.networks import VMF

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "mixture_ood.svg"
SHORT = {
    "head_density": "head: density",
    "head_kappa": "head: κ",
    "head_responsibility": "head: probability",
    "mixture_density": "fitted: density",
    "mixture_kappa": "fitted: κ",
    "knn": "kNN distance",
    "mahalanobis": "Mahalanobis",
    "msp": "probe (MSP)",
}
COLORS, MARKERS = ("#0072B2", "#D55E00", "#009E73"), "osD"


def draw(rows: list[dict[str, Any]]) -> None:
    """Write the picture: AUROC of DINO-vMF's scores, a panel for each kind of data, mean and deviation over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [inside for inside in NEAR if any(row["inside"] == inside for row in rows)]
    look = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "vmf_heads"}
    with pyplot.rc_context(look):
        figure, panels = pyplot.subplots(
            1, len(kinds), figsize=(9.2, 3.6), sharey=True, squeeze=False, layout="constrained"
        )
        for panel, inside in zip(panels[0], kinds, strict=True):
            own = [row["scores"] for row in rows if row["inside"] == inside and row["arm"] == VMF]
            scores = list(own[0])
            places = np.arange(len(scores))
            for index, name in enumerate(own[0][scores[0]]["auroc"]):
                values = 100 * np.array([[found[score]["auroc"][name] for score in scores] for found in own])
                spread = values.std(axis=0, ddof=1) if len(own) > 1 else np.zeros(len(scores))
                panel.errorbar(
                    values.mean(axis=0), places + 0.2 * (index - 1), xerr=spread, fmt=MARKERS[index], markersize=5,
                    capsize=2, color=COLORS[index], label=f"{name} (near)" if name == NEAR[inside] else name,
                )  # fmt: skip
            panel.axvline(50, color="#999999", linewidth=1, linestyle=(0, (2, 2)))
            panel.set(title=f"pretrained on {inside}", xlabel="AUROC, per cent; 50 is chance", xlim=(None, 101))
            panel.set_yticks(places, [SHORT[score] for score in scores])
            panel.legend(loc="best", fontsize=9)
        panels[0, 0].invert_yaxis()
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(PICTURE, format="svg", metadata={"Date": None}, facecolor="white")
        pyplot.close(figure)
