"""`python -m benchmarks faults`: SIGKILL at random moments of training, saving and evaluating, and what is left."""

import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from benchmarks import results

KINDS = ("training", "saving", "evaluating")
PROMISES = {
    "checkpoint": "checkpoint.pt is whole, and of no earlier step than before",
    "metrics": "metrics.jsonl: at most its last line is cut off",
    "results": "results.jsonl: every row that was there is there; the files of predictions are whole",
    "backbone": "backbone/ opens, or is not there",
    "lock": "the folder of the run is free at once",
}
SIZE = ("dataset=folder", "batch_size=32", "epochs=12", "save_every=1", "warmup_epochs=0", "num_workers=0")
SIZE += ("teacher_temp_warmup_epochs=1", "hidden_size=16", "num_attention_heads=2", "num_hidden_layers=2")
SIZE += ("out_dim=32", "hidden_dim=16", "bottleneck_dim=8", "image_size=16", "local_size=8", "num_local_crops=1")
SIZE += ("precision=float32", "lr=0.01")


def faults(*, kills: int = 60, seed: int = 0) -> None:
    """Kill small runs, check every promise after each kill, and compare what they end with to runs that were let alone.

    Prints a table and writes benchmarks/results/faults_cpu_*.json; the exit status is 1 if a promise was broken.

    Args:
        kills: how many.
        seed: of the kinds and the moments. The moments are random in time, so two runs differ in where they strike.
    """
    if kills < 1:
        raise ValueError(f"`kills` (={kills}) must be at least 1")
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder), random.Random(seed))
        while trial.kills.total() < kills:
            trial.strike(KINDS[trial.kills.total() % len(KINDS)])
        trial.finish()
    rows = [{"kind": kind, "kills": trial.kills[kind], "found": dict(trial.found[kind])} for kind in KINDS]
    rows.append({"kind": "runs", "ended": trial.ended, "equal to a run that was let alone": trial.equal})
    print(table(trial))
    print(results.write("faults", "cpu", rows, kills=kills, seed=seed, broken=trial.broken))
    if trial.broken:
        sys.exit("\n".join(trial.broken))


class Trial:
    """Runs that are killed and resumed until they end; `strike` does it once.

    Attributes:
        kills: how many processes were killed while they did each kind of work.
        found: for each kind, how often something was found that is allowed, such as a line that was cut off.
        broken: a sentence for each promise that was broken.
        ended: how many runs came to their end, `equal` of them with the losses of a run that was let alone.
    """

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self.kills: Counter[str] = Counter()
        self.found: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        self.broken: list[str] = []
        self.ended = self.equal = 0
        self.data, self.run = _images(folder / "images"), folder / "run 0"
        began = time.monotonic()
        _in_a_process(_train, folder / "alone", self.data).join()
        self.seconds = time.monotonic() - began  # of a whole run
        self.losses = _losses(folder / "alone")
        began = time.monotonic()
        _in_a_process(_evaluate, folder / "alone", self.data).join()
        self.evaluation_seconds = time.monotonic() - began

    def strike(self, kind: str) -> None:
        """Start some work, kill it at a random moment and check the promises; work that ended earlier was missed."""
        before = state_of(self.run)
        kind = "training" if before["step"] < 0 else kind
        evaluated = kind == "evaluating"
        process = _in_a_process(_evaluate if evaluated else _train, self.run, self.data)
        if kind == "saving":
            self._wait_for_a_save(process)
        else:
            process.join(self.rng.uniform(0, self.evaluation_seconds if evaluated else self.seconds / 4))
        alive = process.is_alive()
        if alive:
            process.kill()
        process.join()
        if alive:
            self.kills[kind] += 1
            self._check(kind, before)
        elif process.exitcode:
            self.broken.append(f"{kind}: a resumed process ended with exit status {process.exitcode}")
            self.kills[kind] += 1  # or a defect would never let this end
        if _steps_left(self.run) == 0 and (self.run / "backbone").is_dir():
            self._end()

    def finish(self) -> None:
        """Let the last run come to its end."""
        _in_a_process(_train, self.run, self.data).join()
        self._end()

    def _wait_for_a_save(self, process: BaseProcess) -> None:
        saves, seen = self.rng.randint(1, 3), False
        partial = self.run / "checkpoint.pt.partial"
        while process.is_alive() and saves:
            now = partial.exists()
            saves -= now and not seen
            seen = now
            time.sleep(0.0002)
        time.sleep(self.rng.uniform(0, 0.03))  # within the save, or just after it

    def _check(self, kind: str, before: dict[str, Any]) -> None:
        after = state_of(self.run)
        for promise in ("checkpoint", "metrics", "results", "backbone", "lock"):
            if after[promise] is not None:
                self.broken.append(f"kill {self.kills.total()}, {kind}: {PROMISES[promise]}; but {after[promise]}")
        if after["step"] < before["step"]:
            self.broken.append(f"kill {self.kills.total()}, {kind}: step {after['step']} after step {before['step']}")
        if after["rows"][: len(before["rows"])] != before["rows"]:
            self.broken.append(f"kill {self.kills.total()}, {kind}: rows of results.jsonl are gone")
        for name in ("partial checkpoint", "cut line of metrics", "cut line of results", "stale lock file"):
            self.found[kind][name] += bool(after[name]) and not before[name]

    def _end(self) -> None:
        self.ended += 1
        self.equal += (same := _losses(self.run) == self.losses)
        if not same:
            self.broken.append(f"{self.run.name}: its losses are not those of the run that was let alone")
        shutil.rmtree(self.run)
        self.run = self.folder / f"run {self.ended}"


def table(trial: Trial) -> str:
    """What was promised, and what happened, as Markdown."""
    lines = ["| killed while | kills | promises broken | left behind, as allowed |", "|---|---|---|---|"]
    for kind in KINDS:
        broken = sum(f", {kind}:" in sentence for sentence in trial.broken)
        left = ", ".join(f"{count} {name}" for name, count in trial.found[kind].items() if count) or "nothing"
        lines.append(f"| {kind} | {trial.kills[kind]} | {broken} | {left} |")
    ends = f"{trial.equal} of {trial.ended} runs ended with the losses of one that was let alone, bit for bit."
    return "\n".join([*(f"- {text}" for text in PROMISES.values()), "", *lines, "", ends])


def _in_a_process(work: Callable[[Path, Path], None], run: Path, data: Path) -> BaseProcess:
    # A fork has imported everything, so that the moments fall into the work.
    process = multiprocessing.get_context("fork").Process(target=_quietly, args=(work, run, data))
    process.start()
    return process


def _quietly(work: Callable[[Path, Path], None], run: Path, data: Path) -> None:
    with (data.parent / "log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    work(run, data)


def _train(run: Path, data: Path) -> None:
    import pretrain

    resume = (run / "checkpoint.pt").exists()
    pretrain.main(pretrain.Options("photos_dino_vmf", run, data=data, overrides=SIZE, resume=resume, collapse_window=0))


def _evaluate(run: Path, data: Path) -> None:
    import evaluate
    from evaluators.request import ExtractOptions, Request

    evaluate.evaluate(Request(str(run), data=data, extract=ExtractOptions(num_workers=0)), "knn")


def _images(folder: Path) -> Path:
    from data.images import load_images

    for split, count in (("train", 256), ("val", 64)):
        images = load_images("digits", split)
        for index in range(count):
            image, label = images[index]
            (folder / split / images.classes[label]).mkdir(parents=True, exist_ok=True)
            image.save(folder / split / images.classes[label] / f"{index}.png")
    return folder


def _losses(run: Path) -> list[tuple[int, float]]:
    from storage.json_lines import read_rows

    return [(row["step"], row["loss"]) for row in read_rows(run / "metrics.jsonl")]


def _steps_left(run: Path) -> int:
    return 12 * (256 // 32) - state_of(run)["step"]


def state_of(run: Path) -> dict[str, Any]:
    """What is in the folder of a run: its step (-1: none), its rows, and what is wrong with what was promised."""
    from storage.lock import FolderInUse, locked
    from training.run import load_checkpoint, load_run

    state: dict[str, Any] = {"step": -1, **dict.fromkeys(PROMISES)}
    state["stale lock file"] = (run / ".lock").exists()
    state["partial checkpoint"] = (run / "checkpoint.pt.partial").exists()
    if (run / "checkpoint.pt").exists():
        try:
            state["step"] = load_checkpoint(run)["step"]
            load_run(run)
        except Exception as error:
            state["checkpoint"] = repr(error)
    for name in ("metrics", "results"):
        lines = (run / f"{name}.jsonl").read_bytes().split(b"\n") if (run / f"{name}.jsonl").exists() else [b""]
        state[f"cut line of {name}"] = lines.pop()  # what follows the last newline
        whole = [_parsed(line) for line in lines]
        if name == "metrics" and None in whole:
            state[name] = f"line {whole.index(None) + 1} is damaged"
        state["rows"] = [row for row in whole if row is not None]
    if (run / "backbone").exists():
        from evaluators.features.encoder import open_encoder

        try:
            open_encoder(run / "backbone")
        except Exception as error:
            state["backbone"] = repr(error)
    try:
        if run.exists():
            with locked(run):
                pass
    except FolderInUse as error:
        state["lock"] = str(error)
    for path in sorted(run.glob("predictions/*.npy")):
        try:
            np.load(path)
        except Exception as error:
            state["results"] = f"{path.name}: {error!r}"
    return state


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
