"""The command: damaged and hostile inputs for every reader, each in a process that may die, and a table of verdicts."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from benchmarks import results
from benchmarks.fuzz.hostile import HOSTILE
from benchmarks.fuzz.loaders import LOADERS, Loader
from benchmarks.fuzz.mutations import damaged
from benchmarks.fuzz.verdict import CRASH, HANG, SECONDS, WRONG, Verdict, fingerprint, judge
from benchmarks.fuzz.watch import Watch

MEMORY = 4 << 30
"""So many bytes more than it has may a process take for a reader; a bomb that goes off needs more."""


def fuzz(*, seed: int = 0, inputs: int = 1000) -> None:
    """Give every reader of files damaged and hostile ones; each must be read, or end in an error that names the file.

    Prints a table and writes benchmarks/results/fuzz_cpu_*.json; the exit status is 1 if anything went wrong.

    Args:
        seed: of the damages; the same seed gives the same inputs.
        inputs: how many damaged files for each reader, fewer for slow ones. The hostile ones are always all tried.
    """
    if inputs < 1:
        raise ValueError(f"`inputs` (={inputs}) must be at least 1")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = fuzzed(Path(folder), seed=seed, inputs=inputs)
    rows = [_row(name, verdicts) for name, verdicts in found.items()]
    wrong = [
        f"{name}, {what}: {verdict.kind}, {verdict.detail}"
        for name, verdicts in found.items()
        for what, verdict in verdicts
        if verdict.kind in WRONG
    ]
    print(table(rows))
    print(results.write("fuzz", "cpu", rows, seed=seed, inputs=inputs, wrong=wrong))
    if wrong:
        sys.exit("\n".join(wrong))


def fuzzed(folder: Path, *, seed: int, inputs: int) -> dict[str, list[tuple[str, Verdict]]]:
    """Return, for each reader, the inputs in words and what came of them."""
    _quiet(folder)
    torch.manual_seed(seed)
    templates = {loader.name: _template(loader, folder) for loader in LOADERS}
    foreign = [path.read_bytes() for _, paths in templates.values() for path in paths[:1]]
    found = {}
    for loader in LOADERS:
        count = max(1, round(inputs * loader.share)) + len(HOSTILE.get(loader.name, ()))
        log = folder / "verdicts.jsonl"
        log.write_text("")
        for _ in tqdm(range(count), desc=loader.name, disable=not sys.stderr.isatty()):
            done = len(log.read_text().splitlines())
            if done == count:
                break
            arguments = (loader, *templates[loader.name], foreign, folder, seed, done, count, log)
            log.touch()
            process = multiprocessing.get_context("fork").Process(target=_work, args=arguments)
            process.start()
            while process.is_alive():
                process.join(1)
                if time.time() - log.stat().st_mtime > 600:  # it waits for something
                    process.kill()
            if process.exitcode:  # the input on which it died has no line yet
                kind = HANG if process.exitcode in (-signal.SIGKILL, -signal.SIGXCPU) else CRASH
                with log.open("a") as file:
                    what = (folder / "current").read_text()
                    file.write(json.dumps([what, kind, f"the process died with status {process.exitcode}"]) + "\n")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        found[loader.name] = [(what, Verdict(kind, detail)) for what, kind, detail in lines]
    return found


def _template(loader: Loader, folder: Path) -> tuple[Path, list[Path]]:
    template = folder / "templates" / loader.name.replace("/", "")
    template.mkdir(parents=True)
    return template, loader.write(template)


def _work(
    loader: Loader,
    template: Path,
    paths: list[Path],
    foreign: list[bytes],
    folder: Path,
    seed: int,
    first: int,
    count: int,
    log: Path,
) -> None:
    sys.stdin.close()
    _limit_memory()
    os.chdir(folder)
    outside, mark = folder / "outside", folder / "executed"
    watch = Watch(folder, outside)
    copy = _copy(template, folder, "whole")
    valid = loader.read(copy, copy / paths[0].relative_to(template))  # or what is wrong is not the damage
    whole = fingerprint(valid) if loader.checked else None
    hostile = HOSTILE.get(loader.name, ())
    with log.open("a") as file, (folder / "log").open("a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        for number in range(first, count):
            copy = _copy(template, folder, f"input {number}")
            if number < len(hostile):
                what, path = hostile[number].name, copy / paths[0].relative_to(template)
                hostile[number].write(copy, path, outside, mark)
                expected = None
            else:
                rng = random.Random(f"{seed},{loader.name},{number - len(hostile)}")
                path = copy / rng.choice(paths).relative_to(template)
                kind, content = damaged(path.read_bytes(), foreign, rng)
                what, expected = f"{kind} in {path.name}, input {number}", whole
                path.write_bytes(content)
            names = (path.name, str(copy), *loader.names)
            (folder / "current").write_text(what)
            # In C, where no signal reaches Python, the system ends the process.
            seconds = int(time.process_time()) + 2 * SECONDS
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
            verdict = judge(
                lambda copy=copy, path=path: loader.read(copy, path), watch, names=names, expected=expected, mark=mark
            )
            file.write(json.dumps([what, verdict.kind, verdict.detail.replace(str(copy), "FOLDER")]) + "\n")
            file.flush()
            shutil.rmtree(copy, ignore_errors=True)


def _copy(template: Path, folder: Path, name: str) -> Path:
    copy = folder / name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(template, copy)
    return copy


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    limit = pages * resource.getpagesize() + MEMORY
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _quiet(folder: Path) -> None:
    import datasets

    warnings.simplefilter("ignore")  # of the libraries that read what is damaged
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.05
    (folder / "outside").mkdir()


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, with a last line of sums."""
    columns = ("inputs", "hostile", "read", "told", *WRONG)
    total = {"reader": "**all**", **{name: sum(row[name] for row in rows) for name in columns}}
    lines = [f"| reader | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    lines += [f"| {row['reader']} | {' | '.join(str(row[name]) for name in columns)} |" for row in (*rows, total)]
    return "\n".join(lines)


def _row(name: str, verdicts: list[tuple[str, Verdict]]) -> dict[str, Any]:
    kinds = Counter(verdict.kind for _, verdict in verdicts)
    hostile = len(HOSTILE.get(name, ()))
    counts = {kind: kinds[kind] for kind in ("read", "told", *WRONG)}
    return {"reader": name, "inputs": len(verdicts), "hostile": hostile, **counts}
