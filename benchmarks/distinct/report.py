"""The table of docs/mixture.md about prototypes that stay distinct, and its picture."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.summary import Rows, select, text
from benchmarks.evidence.summary import table as markdown

IMAGE = Path(__file__).parents[2] / "docs" / "images" / "mixture_distinct.svg"
HEADER = (
    "epochs",
    "prototypes",
    "seeds",
    "unique at cosine 0.9",
    "at 0.5",
    "used by the targets",
    "median κ",
    "kNN, %",
)
HEADER += ("kNN minus the recipe's",)
FEWER = ("epochs", "prototypes", "left at a bound of 1 %", "targets change", "on new images")
FEWER += ("left at a bound of 5 %", "targets change", "on new images")
COLOURS = ("0.45", "#56B4E9", "#0072B2", "#E69F00", "#D55E00")


def table(result: dict[str, Any]) -> str:
    """Two tables, of the prototypes and of the heads compressed: means and standard errors over seeds."""
    rows: Rows = result["rows"]
    lines, fewer = [], []
    for epochs, arm in _cells(rows):
        own, first = select(rows, epochs=epochs, arm=arm), select(rows, epochs=epochs, arm=rows[0]["arm"])
        plain = {row["seed"]: row["knn"] for row in first}
        differences = [row["knn"] - plain[row["seed"]] for row in own if row["seed"] in plain]
        cells = [str(epochs), arm, str(len(own))]
        cells += [text((row["unique"][cosine] for row in own), digits=0) for cosine in ("0.9", "0.5")]
        cells += [text((row["used_targets"] for row in own), digits=0)]
        cells += [text((row["kappa_p50"] for row in own), digits=1)]
        cells += [text((row["knn"] for row in own), digits=1, scale=100)]
        cells += [text(differences, digits=1, scale=100, signed=True) if arm != rows[0]["arm"] else ""]
        lines.append(cells)
        left = [str(epochs), arm]
        for bound in own[0]["compressed"]:
            found = [row["compressed"][bound] for row in own]
            left.append(text((one["prototypes"] for one in found), digits=0))
            left += [
                f"{text((one[name] for one in found), digits=2, scale=100)} %"
                for name in ("total_variation", "total_variation_fresh")
            ]
        fewer.append(left)
    return f"{markdown(HEADER, lines)}\n\n{markdown(FEWER, fewer)}"


def draw(rows: Rows) -> None:
    """Unique prototypes by the cosine from which on two count as one, means over seeds; a panel for each length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    pyplot.rcParams["svg.hashsalt"] = "vmf_heads"  # the same file on every machine
    lengths = list(dict.fromkeys(epochs for epochs, _ in _cells(rows)))
    arms = list(dict.fromkeys(arm for _, arm in _cells(rows)))
    figure, panels = pyplot.subplots(1, len(lengths), figsize=(9, 3.4), layout="constrained", squeeze=False)
    drawn: dict[str, Any] = {}
    for epochs, panel in zip(lengths, panels[0], strict=True):
        for arm, colour in zip(arms, COLOURS, strict=False):
            own = select(rows, epochs=epochs, arm=arm)
            if own:
                cosines = sorted(own[0]["unique"], key=float)
                unique = [np.mean([row["unique"][cosine] for row in own]) for cosine in cosines]
                (line,) = panel.plot([float(cosine) for cosine in cosines], unique, color=colour, marker=".")
                drawn.setdefault(arm, line)
        panel.set_title(f"{epochs} epochs", fontsize=10)
        panel.set(xlabel="cosine from which on two are one", ylabel="unique prototypes", ylim=(0, None))
    shown = [arm for arm in arms if arm in drawn]
    figure.legend([drawn[arm] for arm in shown], shown, loc="outside lower center", ncols=3, frameon=False)
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGE, metadata={"Date": None})
    pyplot.close(figure)


def _cells(rows: Rows) -> list[tuple[int, str]]:
    """(epochs, arm), in the order of the rows, every length together."""
    cells = dict.fromkeys((row["epochs"], row["arm"]) for row in rows)
    return sorted(cells, key=lambda cell: cell[0])
