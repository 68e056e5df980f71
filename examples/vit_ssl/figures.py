"""The paper's figures and one table from runs of several seeds, with standard errors.

    python examples/vit_ssl/ablation.py --recipe photos_dino_vmf --split test --seeds 0 1 2 3 4 --output runs/ablation
    python examples/vit_ssl/figures.py --runs runs/ablation

reads what `ablation.py`, or `seeds.py`, has left in its output directory, and draws kNN by percentiles of kappa
(Figure 2), unique prototypes and the largest set of duplicates (Figures 6 and 7), and the use of the prototypes against
the training time. Nothing is trained or evaluated, and the runs stay as they are.
"""

from __future__ import annotations

from runtime.ending import sound_ending

import json
from pathlib import Path
from typing import Literal

import tyro

from reporting.several_runs.numbers import read_runs
from reporting.several_runs.pages import figures, names, table


def main(
    runs: Path,
    output: Path | None = None,
    split: Literal["val", "test"] = "test",
    settings: tuple[str, ...] = (),
    baseline: str | None = None,
    debug: bool = False,
) -> None:
    """Write the figures as SVG and the numbers behind them as numbers.json; print the table.

    Args:
        runs: directory of runs whose names end in -seedN.
        output: where the files go; by default the folder "figures" in `runs`.
        split: the split on which kNN was evaluated.
        settings: which settings to show, and in which order: what stands before -seedN in the names of the runs. By
            default all of them.
        baseline: the setting that the others are compared with; by default the first.
        debug: show the traceback of an error.
    """
    if not runs.is_dir():
        raise FileNotFoundError(f"`runs` (={str(runs)!r}) must be a directory of runs NAME-seedN")
    rows, others = read_runs(runs, split)
    known = names(rows)
    if missing := [name for name in settings if name not in known]:
        raise ValueError(f"`settings` (={missing[0]!r}) must be among {', '.join(known)}")
    shown = settings or tuple(known)
    if baseline is not None and baseline not in shown:
        raise ValueError(f"`baseline` (={baseline!r}) must be among {', '.join(shown)}")
    rows = [row for name in shown for row in rows if row["name"] == name]
    output = output or runs / "figures"
    output.mkdir(parents=True, exist_ok=True)
    for name, drawn in figures(rows).items():
        (output / name).write_text(drawn, encoding="utf-8")
    (output / "numbers.json").write_text(json.dumps(rows, indent=1))
    print(table(rows, baseline or shown[0]))
    if others:
        print(f"\nLeft out, because kNN on {split} or the prototypes have not been evaluated: {', '.join(others)}")
    print(f"\nFigures: {output}")


if __name__ == "__main__":
    with sound_ending():
        tyro.cli(main)
