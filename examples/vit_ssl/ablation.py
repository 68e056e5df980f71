"""The cells of the paper's Tables 1 and 8, normalisation x centring, with one command.

The paper has six. Eq. 9 can be read in two ways, which differ where there is a constant log C_p: vMF has a seventh.

    python examples/vit_ssl/ablation.py --recipe photos_dino_vmf --split test --output runs/ablation
    python examples/vit_ssl/ablation.py --recipe imagenet_vits16_dino_vmf --data IMAGENET --output RUNS --dry-run

pretrains what is missing, evaluates kNN and the prototypes, and prints one table with every seed, mean and spread.
`--dry-run` prints the commands instead, for a cluster; once their runs are in the output directory, the same command
prints the table. Interrupted, it goes on where it stopped. `figures.py` draws the runs.
"""

from __future__ import annotations

from runtime.ending import sound_ending

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

import tyro

from config.recipe import load_recipe
from reporting.demo_table import read_rows
from runtime.lanes import Job, run_lanes

SCRIPTS = Path(__file__).parent
NORMALIZATIONS = {"none": "None", "l2": "L2", "vmf": "vMF"}
CENTRES = {
    "logit": {"centering": "logit"},
    "probability": {"centering": "probability", "center_on": "responsibilities"},
    "scores": {"centering": "probability", "center_on": "scores"},
}
"""The centre averages logits (Eq. 8), responsibilities, or the softmax of the scores (Eq. 9 as it is printed)."""


@dataclass(frozen=True)
class Ablation:
    """Train and compare the cells of Table 1."""

    recipe: str
    """Name of a DINO or iBOT recipe, or the path of a .yaml file; normalisation and centring are replaced."""
    output: Path
    """Directory of the runs."""
    seeds: tuple[int, ...] = (0, 42)
    """At least two seeds, fixed before any result is looked at; the paper's are 0 and 42."""
    data: Path | None = None
    """The images, for recipes with `dataset: folder`, `hub` or `stream`."""
    split: Literal["val", "test"] = "val"
    """The split whose kNN accuracy is compared; k is chosen on val."""
    lanes: int = 2
    """Runs at a time, one CPU thread each."""
    max_steps: int | None = None
    """Stop each pretraining after this many steps, to try the whole path in less time."""
    dry_run: bool = False
    """Print the commands that are left to do, and run nothing."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < 2:
            raise ValueError(f"`seeds` (={self.seeds}) must be at least two different numbers")
        if self.lanes < 1:
            raise ValueError(f"`lanes` (={self.lanes}) must be at least 1")
        if (method := load_recipe(self.recipe).method) == "msn":
            raise ValueError(
                f"`recipe` (={self.recipe!r}) is of the method {method!r}, which has no centring to compare"
            )

    def directory(self, normalization: str, centre: str, seed: int) -> Path:
        """Return where the run of one cell lives."""
        return self.output / f"{normalization}-{centre}-seed{seed}"

    def jobs(self) -> list[Job]:
        """Return what is left to do, cell by cell."""
        todo = []
        for seed in self.seeds:
            for normalization in NORMALIZATIONS:
                for centre in CENTRES:
                    if is_cell(normalization, centre):
                        todo += self._cell(normalization, centre, seed)
        return todo

    def _cell(self, normalization: str, centre: str, seed: int) -> list[Job]:
        run = self.directory(normalization, centre, seed)
        title, log, data = run.name, run.with_suffix(".log"), [] if self.data is None else ["--data", str(self.data)]
        todo = []
        if not (run / "backbone").exists():
            command = [
                sys.executable,
                str(SCRIPTS / "pretrain.py"),
                "--recipe",
                self.recipe,
                "--output",
                str(run),
                *data,
            ]
            command += ["--seed", str(seed)]
            command += [] if self.max_steps is None else ["--max-steps", str(self.max_steps)]
            command += ["--resume"] if (run / "checkpoint.pt").exists() else []
            command += ["--set", f"normalization={normalization}"]
            command += [f"{field}={value}" for field, value in CENTRES[centre].items()]
            todo.append(Job(f"{title}, pretraining", command, log))
        left = {"knn": accuracy(run, self.split) is None, "prototypes": not has_prototypes(run, self.split)}
        for protocol in [protocol for protocol, is_left in left.items() if is_left]:
            command = [sys.executable, str(SCRIPTS / "evaluate.py"), protocol, "--checkpoint", str(run), *data]
            todo.append(Job(f"{title}, {protocol}", [*command, "--split", self.split], log))
        return todo


def is_cell(normalization: str, centre: str) -> bool:
    """Return whether the cell is one of its own: without log C_p both readings of Eq. 9 are the same centre."""
    return normalization == "vmf" or centre != "scores"


def main(ablation: Ablation) -> None:
    """Do what is left to do, then print the table."""
    jobs = ablation.jobs()
    if ablation.dry_run:
        print("\n".join(shlex.join(job.command) for job in jobs))
    else:
        run_lanes(in_lanes(jobs, ablation.lanes))
    print(table(ablation))


def in_lanes(jobs: Sequence[Job], lanes: int) -> dict[str, list[Job]]:
    """Return the jobs dealt out to lanes; those of one cell stay together, in their order."""
    cells = list(dict.fromkeys(job.log for job in jobs))
    return {
        f"lane {lane + 1}": [job for job in jobs if cells.index(job.log) % lanes == lane]
        for lane in range(min(lanes, len(cells)))
    }


def accuracy(run: Path, split: str) -> float | None:
    """Return the kNN accuracy of a run's teacher, None where it has not been evaluated; the newest one counts."""
    path = run / "results.jsonl"
    rows = read_rows(path) if path.exists() else []
    found = [
        row["value"] for row in rows if (row["protocol"], row["features"], row["split"]) == ("knn", "teacher", split)
    ]
    return found[-1] if found else None


def has_prototypes(run: Path, split: str) -> bool:
    """Return whether the teacher's prototypes have been counted, and kNN on this split divided by their kappa."""
    path = run / "results.jsonl"
    rows = [row for row in read_rows(path) if row["protocol"] == "prototypes"] if path.exists() else []
    by_kappa = [row["split"] for row in rows if row["metric"].startswith("top1@")]  # none where all kappa are equal
    return bool(rows) and (not by_kappa or split in by_kappa)


def table(ablation: Ablation) -> str:
    """Return Table 8 in Markdown: per cent of every seed, mean and standard deviation, and – where a run is missing.

    A cell that equals its neighbour is left empty.
    """
    heads = [f"{centre}, seeds {', '.join(map(str, ablation.seeds))}" for centre in CENTRES]
    lines = [f"| kNN, {ablation.split} | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for normalization, name in NORMALIZATIONS.items():
        cells = []
        for centre in CENTRES:
            if not is_cell(normalization, centre):
                cells.append("")
                continue
            runs = [ablation.directory(normalization, centre, seed) for seed in ablation.seeds]
            values = [accuracy(run, ablation.split) for run in runs]
            known = [100 * value for value in values if value is not None]
            shown = " ".join("–" if value is None else f"{100 * value:.2f}" for value in values)
            summary = f" (mean {mean(known):.2f}, sd {stdev(known):.2f})" if len(known) == len(values) else ""
            cells.append(shown + summary)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    with sound_ending():
        main(tyro.cli(Ablation, config=(tyro.conf.FlagCreatePairsOff,)))
