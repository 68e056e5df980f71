"""The table of docs/mixture.md about heads that are fitted to a backbone, and its picture."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.summary import Rows, select, text
from benchmarks.evidence.summary import table as markdown

IMAGE = Path(__file__).parents[2] / "docs" / "images" / "mixture_warm_start.svg"
HEADER = ("set", "head", "seeds", "median κ fitted", "loss before the first step", "used before", "used after")
HEADER += ("kNN after", "kNN, minus the random head's")
COLOURS = ("0.45", "#E69F00", "#D55E00", "#56B4E9", "#0072B2", "#009E73")


def table(result: dict[str, Any]) -> str:
    """Means and standard errors over seeds; differences are paired, by the seed."""
    rows: Rows = result["rows"]
    lines = []
    for name in dict.fromkeys(row["set"] for row in rows):
        of_set = select(rows, set=name)
        random = {row["seed"]: row["knn"] for row in of_set if row["arm"] == _arms(rows)[0]}
        before = {row["seed"]: row["knn_before"] for row in of_set}
        knn = text(before.values(), digits=1, scale=100)
        lines.append((name, "the backbone before", str(len(before)), "", "", "", "", knn, ""))
        for arm in _arms(of_set):
            own = select(of_set, arm=arm)
            differences = [row["knn"] - random[row["seed"]] for row in own if arm != _arms(rows)[0]]
            lines.append(
                (
                    name,
                    arm,
                    str(len(own)),
                    text((row["fitted_kappa"] for row in own), digits=0) if "fitted_kappa" in own[0] else "",
                    text((row["loss_before"] for row in own), digits=2),
                    text((row["used_before"] for row in own), digits=0),
                    text((row["used"] for row in own), digits=0),
                    text((row["knn"] for row in own), digits=1, scale=100),
                    text(differences, digits=1, scale=100, signed=True) if differences else "",
                )
            )
    return markdown(HEADER, lines)


def draw(rows: Rows) -> None:
    """Loss and prototypes used during the training, means over seeds, a row of panels for each set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    pyplot.rcParams["svg.hashsalt"] = "vmf_heads"  # the same file on every machine
    sets = list(dict.fromkeys(row["set"] for row in rows))
    figure, panels = pyplot.subplots(len(sets), 2, figsize=(9, 2.7 * len(sets)), layout="constrained", squeeze=False)
    labels = {"loss_over_time": "loss", "prototypes_used_over_time": "prototypes used by the targets of a step"}
    for name, row_of_panels in zip(sets, panels, strict=True):
        for panel, (key, label) in zip(row_of_panels, labels.items(), strict=True):
            for arm, colour in zip(_arms(rows), COLOURS, strict=False):
                own = select(rows, set=name, arm=arm)
                if own:
                    panel.plot(own[0]["steps"], np.mean([row[key] for row in own], axis=0), color=colour, label=arm)
            panel.set_title(f"{name}: {label}", fontsize=10)
            panel.set_xlabel("step")
            if key.startswith("loss"):
                panel.set(yscale="log", yticks=[3, 5, 10, 20, 50])
                panel.yaxis.set_major_formatter("{x:.0f}")
                panel.yaxis.set_minor_locator(pyplot.NullLocator())
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGE, metadata={"Date": None})
    pyplot.close(figure)


def _arms(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows))
