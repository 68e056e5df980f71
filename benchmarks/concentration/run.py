"""`python -m benchmarks concentration`: vmf_concentration and its peers against exact values."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import results
from benchmarks.concentration.peers import PEERS
from benchmarks.concentration.truth import Truth, load_truth
from benchmarks.timing import interleaved_medians
from vmf_heads.mixture import vmf_concentration

OURS = "vmf_heads"
DIMENSIONS = (2, 3, 16, 64, 256, 1024, 1_000_000)
"""Those with a column of their own."""

ELEMENTS, DIMENSION = 65_536, 256
"""What is timed: so many numbers, in one dimension."""

IMAGE = Path(__file__).parents[2] / "docs" / "images" / "mixture_concentration.svg"


def concentration(*, accuracy_only: bool = False) -> None:
    """Score vmf_concentration, Banerjee's and Sra's estimates and SciPy's fit at every exact value, and time them.

    Writes benchmarks/results/concentration_cpu_*.json, the table of docs/mixture.md and
    docs/images/mixture_concentration.svg. A minute on one quiet CPU core.

    Args:
        accuracy_only: no timings; they mean something only on a machine that does nothing else.
    """
    from benchmarks.mixture_docs import update_docs  # it imports the tables of all benchmarks of that page

    torch.set_num_threads(1)
    rows = measure()
    speeds = {} if accuracy_only else nanoseconds()
    print(results.write("concentration", "cpu", rows, nanoseconds=speeds, elements=ELEMENTS, p=DIMENSION))
    draw()
    update_docs()


def ours(argument: np.ndarray, p: int, *, complement: bool = False) -> np.ndarray:
    """Our kappa in the dtype of the argument."""
    return vmf_concentration(torch.from_numpy(argument), p, complement=complement).numpy()


def measure() -> list[dict[str, Any]]:
    """One row per method, kind of argument, dtype and p: the largest relative error, and how many points fail."""
    rows = []
    for (p, given), truth in tqdm(load_truth().items(), desc="accuracy"):
        for dtype in ("float32", "float64"):
            kappa = ours(truth.argument.astype(dtype), p, complement=given == "complement")
            rows.append(_row(OURS, truth, kappa))
        if given == "resultant":
            for name, method in PEERS.items():
                with np.errstate(all="ignore"):
                    rows.append(_row(name, truth, method(truth.argument, p)))
    return rows


def _row(method: str, truth: Truth, kappa: np.ndarray) -> dict[str, Any]:
    info = np.finfo(kappa.dtype)
    expected = truth.kappa.normal(kappa.dtype) & (truth.kappa.high <= float(info.max))
    got, error = kappa[expected], np.abs(truth.kappa.error(kappa, kappa.dtype))[expected]
    finite = np.isfinite(got)
    return {
        "method": method,
        "given": truth.given,
        "dtype": str(kappa.dtype),
        "p": truth.p,
        "points": int(expected.sum()),
        "non_finite": int((~finite).sum()),
        "beyond_4_eps": int((error[finite] > 4).sum()),
        "largest_eps": float(f"{error[finite].max():.3g}") if finite.any() else None,
    }


def nanoseconds() -> dict[str, float]:
    """Per element, at the size of a head's prototypes; SciPy's fit takes one sample at a time."""
    x = torch.rand(ELEMENTS, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05
    few = x[:16].numpy()
    contenders = {OURS: lambda: vmf_concentration(x, DIMENSION)}
    for name, method in PEERS.items():
        argument = few if method is PEERS["scipy.stats.vonmises_fisher.fit"] else x.numpy()
        contenders[name] = lambda method=method, argument=argument: method(argument, DIMENSION)
    seconds = interleaved_medians(contenders, rounds=5, seconds=0.1)
    elements = {name: len(few) if "scipy" in name else ELEMENTS for name in seconds}
    return {name: float(f"{1e9 * value / elements[name]:.3g}") for name, value in seconds.items()}


def table(result: dict[str, Any]) -> str:
    """The largest relative error at some dimensions, over all of them how many points fail, and the time."""
    head = ["method", "argument", "dtype", *(f"p = {p:,}".replace(",", " ") for p in DIMENSIONS)]
    head += ["not finite", "beyond 4 eps", "points", "ns per element"]
    lines = [head, ["---"] * len(head)]
    names = {"resultant": "R", "complement": "1 − R"}
    for key in dict.fromkeys((row["method"], row["given"], row["dtype"]) for row in result["rows"]):
        own = [row for row in result["rows"] if (row["method"], row["given"], row["dtype"]) == key]
        eps = float(np.finfo(key[2]).eps)
        largest = {row["p"]: row["largest_eps"] for row in own}
        cells = ["" if largest[p] is None else f"{largest[p] * eps:.0e}" for p in DIMENSIONS]
        totals = [f"{sum(row[name] for row in own)}" for name in ("non_finite", "beyond_4_eps", "points")]
        time = result["nanoseconds"].get(key[0]) if key[1:] == ("resultant", "float64") else None
        lines.append([key[0], names[key[1]], key[2], *cells, *totals, "" if time is None else f"{time:,.0f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw() -> None:
    """Relative error against R at three dimensions, float64."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    matplotlib.rcParams["svg.hashsalt"] = "vmf_heads"  # the same file on every machine
    figure, panels = pyplot.subplots(1, 3, figsize=(10, 3.2), sharey=True, layout="constrained")
    styles = [("#0072B2", "o"), ("#999999", "v"), ("#D55E00", "s"), ("#009E73", "^")]
    for panel, p in zip(panels, (3, 256, 1024), strict=True):
        truth = load_truth()[p, "resultant"]
        logit = np.log10(truth.argument / (1 - truth.argument))
        for (name, method), (colour, marker) in zip({OURS: ours, **PEERS}.items(), styles, strict=True):
            with np.errstate(all="ignore"):
                error = np.abs(truth.kappa.error(method(truth.argument, p), np.dtype("float64"))) * 2.0**-52
            shown = np.isfinite(error) & (np.abs(logit) < 8)
            panel.semilogy(
                logit[shown], np.maximum(error[shown], 1e-17), marker, color=colour, ms=4, ls="-", lw=0.7, label=name
            )
        panel.set(title=f"p = {p}", xlabel="log₁₀ R / (1 − R)")
    panels[0].set_ylabel("relative error of κ, float64")
    panels[0].legend(fontsize=7, loc="upper right")
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGE, metadata={"Date": None})
    pyplot.close(figure)
