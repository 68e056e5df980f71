"""`python -m benchmarks photos` collects the ablation's runs under the names of the other tables."""

import json

import pytest
from benchmarks import photos, results
from benchmarks.evidence.image_tables import by_fifth, table_1


def run_row(name, seed, **changes):
    """What `read_runs` returns of a run."""
    return {
        "name": name, "seed": seed, "normalization": name.split("-")[0], "centering": "logit", "center_on": "scores",
        "knn": 0.7 + 0.01 * seed, "seconds": 60.0, "used_scores": 0.1, "used_logits": 0.2, "used_targets": 0.3,
        "kappa": {"p05": 8.0, "p95": 12.0}, "by_kappa": {"0-20": 0.5, "80-100": 0.75}, "cosines": [0.9],
        "unique": [1.0], "largest_set": [0.1], "over_time": {"prototypes_used": [3.0, 4.0]},
    } | changes  # fmt: skip


def test_rows_have_the_names_of_the_other_tables_and_seeds_take_turns(tmp_path, monkeypatch, capsys):
    rows = [run_row(name, seed) for name in ("none-logit", "vmf-scores", "l2-logit") for seed in (0, 1)]
    rows[-1]["by_kappa"] = rows[-2]["by_kappa"] = {}
    monkeypatch.setattr(photos, "read_runs", lambda runs, split: (rows, ["vmf-logit-seed0"]))
    monkeypatch.setattr(
        photos, "knn", lambda run, features: {"pixels": 0.4, "random": int(run.name[-1]) + 0.6}[features]
    )
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    photos.photos(runs=tmp_path)
    assert "left out: vmf-logit-seed0" in capsys.readouterr().out
    result = json.loads(next(tmp_path.glob("photos_table_cpu_*.json")).read_text())
    assert [(row["seed"], row["arm"]) for row in result["rows"]] == [
        (seed, arm) for seed in (0, 1) for arm in ("none, logit", "L2, logit", "vMF, scores")
    ]
    assert (result["raw_pixels_knn"], result["untrained_knn"], result["cosines"]) == (0.4, [0.6, 1.6], [0.9])
    assert result["rows"][0]["knn_by_fifth"] == [0.5, None, None, None, 0.75]
    assert result["rows"][0]["kappa_spread"] == 1.5
    assert "| none, logit | 2 | 70.50±0.50 |  | 0.10±0.00 | 0.20±0.00 | 0.30±0.00 |" in table_1(result)
    assert "| vMF, scores | 50.0±0.0 | – | – | – | 75.0±0.0 | +25.0±0.0 |" in by_fifth(result)


def test_baselines_are_evaluated_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(photos, "evaluate", lambda request, name: asked.append((request, name)) or [{"value": 0.25}])
    assert photos.knn(tmp_path, "random") == 0.25
    ((request, name),) = asked
    assert (request.checkpoint, request.features, request.split, name) == (str(tmp_path), "random", "test", "knn")
    row = {"protocol": "knn", "features": "random", "split": "test", "metric": "top1", "value": 0.5}
    rows = [row, row | {"value": 0.75}, row | {"features": "teacher"}, row | {"split": "val", "value": 0.1}]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert photos.knn(tmp_path, "random") == pytest.approx(0.75), "the newest"
    assert len(asked) == 1
