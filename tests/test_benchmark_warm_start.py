"""`python -m benchmarks warm-start`: every head goes on from one backbone, and differences are paired."""

import json
from pathlib import Path

import pytest
import torch
from benchmarks import mixture_docs, results
from benchmarks.warm_start import report, run

from tiny_run import TINY_RUN

TINY = (*TINY_RUN, "batch_size=128", "epochs=1", "freeze_last_layer_epochs=0")
ISOMETRIC = "fitted after the isometric start, κ at 1/τ"


def test_the_command_compares_heads_on_one_backbone_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "SETS", {"digits": TINY})
    monkeypatch.setattr(run, "GOES_ON", TINY)
    monkeypatch.setattr(run, "ARMS", {arm: run.ARMS[arm] for arm in (run.RANDOM, ISOMETRIC)})
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "IMAGE", tmp_path / "picture.svg")
    monkeypatch.setattr(mixture_docs, "update_docs", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run.warm_start(seeds=(0,), output=tmp_path / "runs")
    random, fitted = (json.loads(line) for line in (tmp_path / "runs" / "warm_start.jsonl").read_text().splitlines())
    assert random["knn_before"] == fitted["knn_before"]
    assert fitted["used_before"] > random["used_before"]
    assert fitted["kappa_before"] == pytest.approx(10, rel=0.05)
    assert [row["steps"][-1] for row in (random, fitted)] == [8, 8]
    assert (tmp_path / "picture.svg").stat().st_size > 1000
    monkeypatch.setattr(run, "measured", None)  # a call would raise
    run.warm_start(seeds=(0,), output=tmp_path / "runs")


def test_differences_are_those_of_one_seed() -> None:
    common = {"set": "digits", "loss_before": 2.0, "used_before": 10, "used": 20, "knn_before": 0.5}
    rows = [{"arm": "random", "seed": seed, "knn": 0.5 + seed / 10} | common for seed in (0, 1, 2)]
    rows += [{"arm": "fitted", "seed": s, "knn": 0.6 + s / 10, "fitted_kappa": 40.0} | common for s in (2, 1, 0)]
    table = report.table({"rows": rows})
    assert "| digits | random | 3 |  | 2.00±0.00 | 10±0 | 20±0 | 60.0±5.8 |  |" in table
    assert "| digits | fitted | 3 | 40±0 | 2.00±0.00 | 10±0 | 20±0 | 70.0±5.8 | +10.0±0.0 |" in table
