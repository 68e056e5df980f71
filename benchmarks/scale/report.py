"""The tables of docs/scale.md and docs/images/scale.svg."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.marked_tables import filled
from benchmarks.scale.model import GATHERED, REPLICATED, Cost, Setting, best_shards, cost

DOCS = Path(__file__).parents[2] / "docs"
NAMES = {REPLICATED: "replicated (DDP)", GATHERED: "gathered (FSDP2)"}
HEADS = ((65_536, 256), (262_144, 512), (1_048_576, 1024))
RANKS = (8, 64, 512, 4096)
NODE = 8  # ranks of a machine, whose connections are faster than those between machines


def model_table(batch: Mapping[str, int]) -> str:
    """Bytes sent in a step and most bytes held, for heads and numbers of ranks of which most cannot be tried here."""
    lines = ["| K, p | ranks | replicated | gathered | 8 shards | least sent: shards |", "|---" * 6 + "|"]
    for (prototypes, dim), ranks in ((head, ranks) for head in HEADS for ranks in RANKS):
        setting = Setting(prototypes, dim, ranks, **batch)
        best = best_shards(setting)
        cells = [_both(cost(setting, shards)) for shards in (REPLICATED, GATHERED, NODE, best)]
        lines.append(f"| {prototypes:,}, {dim} | {ranks} | {' | '.join(cells[:3])} | {cells[3]}: {best} |")
    return "\n".join(lines)


def measured_table(result: Mapping[str, Any]) -> str:
    """What real steps sent, held and took at most, each with its ratio to what the model says."""
    lines = ["| ranks, layout | sent | held after a step | at most in a step |", "|---" * 4 + "|"]
    for row in result["rows"]:
        model = cost(Setting(ranks=row["ranks"], **result["head"]), row["shards"])
        layout = NAMES.get(row["shards"]) or _layout(row["ranks"], row["shards"])
        cells = [f"{row[name] / 2**20:.1f} MiB, {row[name] / getattr(model, name):.2f}" for name in Cost._fields]
        lines.append(f"| {row['ranks']}, {layout} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _layout(ranks: int, shards: int) -> str:
    copies = ranks // shards
    return f"{shards} shards" + (f", {copies} copies" if copies > 1 else "")


def _both(found: Cost) -> str:
    return f"{_size(found.sent)}, {_size(found.peak)}"


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def draw(batch: Mapping[str, int]) -> None:
    """Bytes sent and held against the number of ranks, for K = 262 144, p = 512."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    matplotlib.rcParams["svg.hashsalt"] = "vmf_heads"  # the same file on every machine
    from matplotlib import pyplot

    ranks = [2**power for power in range(1, 13)]
    settings = [Setting(*HEADS[1], count, **batch) for count in ranks]
    lines = {
        "replicated": ("#D55E00", "s", [cost(setting, REPLICATED) for setting in settings]),
        "gathered": ("#009E73", "^", [cost(setting, GATHERED) for setting in settings]),
        "sharded over all ranks": ("#0072B2", "o", [cost(setting, setting.ranks) for setting in settings]),
        "sharded over 8": ("#56B4E9", "D", [cost(s, min(NODE, s.ranks)) for s in settings]),
    }
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axes, name, label in zip(panels, ("sent", "peak"), ("sent in a step", "held at most"), strict=True):
        for layout, (colour, marker, costs) in lines.items():
            gibibytes = [getattr(found, name) / 2**30 for found in costs]
            axes.plot(ranks, gibibytes, marker + "-", color=colour, label=layout, markersize=4)
        axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel=f"{label}, GiB of one rank")
        axes.set_xticks([2, 8, 64, 512, 4096], ["2", "8", "64", "512", "4096"], minor=False)
        axes.set_xticks([], minor=True)
    panels[0].legend(frameon=False)
    figure.savefig(DOCS / "images" / "scale.svg", metadata={"Date": None})
    pyplot.close(figure)


def update_docs() -> None:
    """Replace what stands between the markers of docs/scale.md by tables of the newest results."""
    page = DOCS / "scale.md"
    page.write_text(rendered(page.read_text()))


def rendered(page: str) -> str:
    """`page` with what stands between `<!-- table: NAME -->` and `<!-- end -->` made anew."""
    result = results.latest("scale")
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("vmf_heads", "torch"))
    source = f"*{result['device']}, one thread a rank, {result['date']}; {versions}.*"
    tables = {"model": model_table(result["batch"]), "measured": f"{measured_table(result)}\n\n{source}"}
    return filled(page, tables.__getitem__)
