"""figures.py: the numbers that runs of several seeds have kept, means with standard errors, and what is left out."""

import json
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

import figures
from config.recipe import load_recipe, save_recipe
from evaluators.prototypes.tables import DUPLICATES, write_table
from reporting.several_runs import charts, pages
from reporting.several_runs.numbers import read_runs

RANGES = ("0-20", "20-40", "40-60", "60-80", "80-100")


def write_run(folder, name, seed, knn, *, normalization="vmf", used=32, epochs=3, by_kappa=0.5):
    """A run of 128 prototypes and two steps per epoch, as ablation.py leaves it."""
    run = folder / f"{name}-seed{seed}"
    run.mkdir(parents=True)
    save_recipe(load_recipe("photos_dino_vmf", {"normalization": normalization}), run / "recipe.yaml")
    counted = {"prototypes": 128, "used_scores": used, "used_logits": 2 * used, "used_targets": 4 * used}
    counted |= {
        f"kappa_{name}": value
        for name, value in zip(("min", "p05", "p50", "p95", "max"), (1, 8, 10, 16, 20), strict=True)
    }
    rows = [("prototypes", "train", metric, value) for metric, value in counted.items()]
    if normalization != "l2":
        rows += [("prototypes", "test", f"top1@kappa_{r}", by_kappa + 0.1 * i) for i, r in enumerate(RANGES)]
    rows += [("knn", "test", "top1", 0.1), ("knn", "val", "top1", 0.2), ("knn", "test", "top1", knn)]
    rows = [
        {"features": "teacher", **dict(zip(("protocol", "split", "metric", "value"), row, strict=True))} for row in rows
    ]
    (run / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_table(
        run / "prototypes" / DUPLICATES, [{"cosine": c, "unique": 128 * c, "largest_set": 64} for c in (0.5, 1)]
    )
    steps = [
        {"step": s + 1, "epoch": s // 2, "prototypes_used": 10.0 * s, "kappa_p05": 8.0, "kappa_p95": 8.0 + s}
        | {"seconds": s + 1.0}
        for s in range(2 * epochs)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    return run


@pytest.fixture
def runs(tmp_path):
    for seed, plain, vmf in ((0, 0.70, 0.72), (1, 0.72, 0.73), (2, 0.74, 0.77)):
        write_run(tmp_path, "none-logit", seed, plain, normalization="none", used=3)
        write_run(tmp_path, "vmf-probability", seed, vmf, by_kappa=0.4 + 0.1 * seed)
    write_run(tmp_path, "l2-logit", 0, 0.71, normalization="l2", epochs=2)
    (tmp_path / "notes").mkdir()
    return tmp_path


def test_a_row_holds_the_newest_numbers_of_its_run(runs):
    rows, others = read_runs(runs, "test")
    assert others == []
    assert [(row["name"], row["seed"]) for row in rows] == [
        ("l2-logit", 0), *(("none-logit", s) for s in range(3)), *(("vmf-probability", s) for s in range(3))
    ]  # fmt: skip
    row = rows[-1]
    assert (row["normalization"], row["knn"], row["seconds"]) == ("vmf", 0.77, 6.0)
    assert (row["used_scores"], row["used_logits"], row["used_targets"]) == (0.25, 0.5, 1.0)
    assert row["by_kappa"] == {name: pytest.approx(0.6 + 0.1 * i) for i, name in enumerate(RANGES)}
    assert (row["cosines"], row["unique"], row["largest_set"]) == ([0.5, 1.0], [0.5, 1.0], [0.5, 0.5])
    assert row["over_time"]["prototypes_used"] == [5.0, 25.0, 45.0]
    assert rows[0]["by_kappa"] == {}


def test_runs_that_were_not_evaluated_are_named(runs):
    write_run(runs, "vmf-scores", 0, 0.7)
    (runs / "vmf-scores-seed0" / "results.jsonl").unlink()
    assert read_runs(runs, "test")[1] == ["vmf-scores-seed0"]
    with pytest.raises(FileNotFoundError, match=r"`runs` \(='.*/none'\) must be a directory of runs NAME-seedN"):
        figures.main(runs / "none")
    with pytest.raises(FileNotFoundError, match=r"`runs` .* must hold evaluated runs .* 8 runs .* kNN on train"):
        read_runs(runs, "train")


def test_the_table_is_paired_by_seed_with_standard_errors(runs):
    lines = pages.table(read_runs(runs, "test")[0], "none-logit").splitlines()
    error = np.std([2, 1, 3], ddof=1) / math.sqrt(3)
    mean_error = np.std([72, 73, 77], ddof=1) / math.sqrt(3)
    assert lines[0].startswith("|  | seeds | kNN, % | minus none-logit, points |")
    assert lines[-1] == (
        f"| vmf-probability | 3 | 74.00 ± {mean_error:.2f} | +2.00 ± {error:.2f} | 0.25 ± 0.00 | 0.50 ± 0.00 "
        "| 1.00 ± 0.00 | 2.00 ± 0.00 |"
    )
    assert lines[2].startswith("| l2-logit | 1 | 71.00 | +1.00 | 0.25 |")


def test_means_leave_out_what_a_seed_does_not_have():
    means, errors = charts.mean_and_error(np.array([[1.0, 2.0, np.nan], [3.0, np.nan, np.nan]]))
    assert means[:2].tolist() == [2.0, 2.0]
    assert errors[0] == pytest.approx(1.0)
    assert np.isnan([errors[1], means[2], errors[2]]).all()


def test_the_charts_show_means_over_the_seeds(runs, monkeypatch):
    monkeypatch.setattr(charts.charts, "to_svg", lambda drawn: drawn)
    rows = read_runs(runs, "test")[0]
    drawn = pages.figure_2(rows).axes[0]
    shown = {container.get_label(): container.lines[0].get_ydata() for container in drawn.containers}
    assert set(shown) == {"none-logit", "vmf-probability"}  # the kappa of l2-logit are all equal
    assert shown["vmf-probability"] == pytest.approx([50, 60, 70, 80, 90])
    unique = pages.duplicates(rows).axes[0].containers
    assert [container.get_label() for container in unique] == ["l2-logit", "none-logit", "vmf-probability"]
    used, spread = pages.over_time(rows).axes
    assert used.containers[0].lines[0].get_ydata()[:2] == pytest.approx([5, 25])  # two epochs
    assert spread.containers[1].lines[0].get_ydata() == pytest.approx([8.5 / 8, 10.5 / 8, 12.5 / 8])


def test_the_command_writes_figures_and_numbers_and_chooses_settings(runs, capsys):
    figures.main(runs, settings=("vmf-probability", "l2-logit"), baseline="l2-logit")
    folder = runs / "figures"
    assert {path.name for path in folder.iterdir()} == {
        "figure_2.svg", "figures_6_7.svg", "use_over_time.svg", "numbers.json"
    }  # fmt: skip
    for path in folder.glob("*.svg"):
        assert ElementTree.fromstring(path.read_text()).tag.endswith("svg")
    assert "| vmf-probability | 3 | 74.00" in capsys.readouterr().out
    assert len(json.loads((folder / "numbers.json").read_text())) == 4
    with pytest.raises(ValueError, match=r"`settings` \(='vmf'\) must be among l2-logit, none-logit, vmf-probability"):
        figures.main(runs, settings=("vmf",))
    with pytest.raises(ValueError, match=r"`baseline` \(='none-logit'\) must be among l2-logit"):
        figures.main(runs, settings=("l2-logit",), baseline="none-logit")
