"""docs/evidence.md shows what the result files hold, and its conclusions are theirs."""

import dataclasses
import math

import pytest
from benchmarks import results
from benchmarks.evidence import figures, image_tables, report
from benchmarks.evidence.summary import mean_and_error, select, table, text
from benchmarks.fashion.train import Settings
from benchmarks.marked_tables import names


def test_the_page_shows_the_committed_results() -> None:
    page = report.DOCS.read_text()
    assert set(report.TABLES) >= set(names(page)) >= {"summary", "readings"}
    assert report.rendered(page) == page, "run `python -m benchmarks evidence`"


@pytest.mark.parametrize("speed", [1.0, 3.0, 10.0])
def test_the_default_reading_holds_what_the_page_says_of_it(speed: float) -> None:
    rows = select(results.latest("mixture_readings")["rows"], p=16, prototypes=64, norm_speed=speed, norm_decay=0.0)

    def mean(arm: str, name: str) -> float:
        own = select(rows, arm=arm)
        assert len(own) == 5
        return mean_and_error(row[name] for row in own)[0]

    assert mean("vMF, responsibilities", "used_by_logits") >= 0.9 > mean("vMF, scores", "used_by_logits")
    assert mean("vMF, responsibilities", "purity") >= 0.95
    assert mean("vMF, responsibilities", "rank_correlation") >= 0.6 > 0 > mean("none, logit", "rank_correlation")


def test_means_have_the_standard_error_of_the_mean() -> None:
    mean, error = mean_and_error([1.0, 2.0, None, 3.0])
    assert (mean, error) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert mean_and_error([None]) is None
    assert text([0.5, -1.5], signed=True) == "−0.50±1.00"
    assert text([0.25], scale=100, digits=1, signed=True) == "+25.0"
    assert text([]) == "–"
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_the_pictures_are_drawn_from_result_files(tmp_path, monkeypatch) -> None:
    rows = [
        {"p": 16, "prototypes": 64, "norm_decay": 0.0, "norm_speed": speed, "arm": arm, "seed": seed}
        | {"used_by_logits": 0.5 + 0.1 * seed, "purity": 0.9, "rank_correlation": None if seed else 0.5}
        | {"knn_by_fifth": [0.7, 0.7, 0.8, None, 0.9 + 0.01 * seed]}
        for speed in (1.0, 3.0)
        for arm in figures.COLOURS
        for seed in (0, 1)
    ]
    whole = [row | {"unique": [0.4, 0.9], "largest_set": [0.2, 0.1], "used_over_time": [0.3, 0.6]} for row in rows]
    found = {"mixture_readings": rows, "fashion_table": rows}

    def latest(name: str) -> dict:
        if name not in found:
            raise FileNotFoundError(name)
        return {"rows": found[name], "cosines": [0.5, 0.9]}

    monkeypatch.setattr(figures, "IMAGES", tmp_path)
    monkeypatch.setattr(results, "latest", latest)
    figures.draw()  # older rows have no duplicates and no use over time, and there are no results on photographs
    assert {path.name for path in tmp_path.iterdir()} == {"evidence_readings.svg", "evidence_fashion_figure_2.svg"}
    found |= {"fashion_table": whole, "photos_table": whole}
    figures.draw()
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kinds = [f"{images}_{kind}" for images in ("fashion", "photos") for kind in ("figure_2", "figures_6_7", "use")]
    assert set(drawn) == {f"evidence_{kind}.svg" for kind in ("readings", *kinds)}
    for label, colour, _ in figures.COLOURS.values():
        assert colour in drawn["evidence_readings.svg"], label
    for name, picture in drawn.items():
        assert "<svg" in picture, name


def test_the_table_of_stability_counts_what_failed() -> None:
    fine = dataclasses.asdict(Settings(lr=0.02, clip=0.0)) | {"arm": "none, logit", "finite": True, "knn": 0.8}
    fine |= {"used_by_logits": 0.25, "spike": 0.125, "largest_norm": 3.0, "marginal_entropy": 0.9}
    rows = [fine, fine | {"marginal_entropy": 0.05, "knn": 0.6}, fine | {"finite": False}]
    rows.append(dataclasses.asdict(Settings()) | {"arm": "none, logit", "finite": False})
    first, second = image_tables.stability({"rows": rows}).splitlines()[2:]
    assert first == "| lr 0.02, no clipping | 3 | 0.25, 0.12, 3.0, 70.0, **1 not finite**, **1 collapsed** |"
    assert second == "| none | 1 | **1 not finite** |"


def test_making_the_tables_changes_nothing_between_them(monkeypatch) -> None:
    monkeypatch.setattr(
        report, "TABLES", {"a": ("file", lambda result: "| A |"), "b": ("file", lambda result: "| B |")}
    )
    monkeypatch.setattr(results, "latest", lambda name: {})
    monkeypatch.setattr(report, "_provenance", lambda result: "*from*")
    page = "# Page\n<!-- table: a -->\n<!-- end -->\ntext\n<!-- table: b -->\n\n| old |\n<!-- end -->\nlast\n"
    made = report.rendered(page)
    assert (
        made.replace("| A |", "").replace("| B |", "").replace("*from*", "").split()
        == page.replace("| old |", "").split()
    )
    assert report.rendered(made) == made


def test_differences_are_paired_by_seed() -> None:
    """The two contenders vary far more between seeds than from each other; seed 2 has only one of them."""
    ours = [{"arm": "vMF, responsibilities", "seed": seed, "knn": 0.1 * seed + 0.01} for seed in (0, 1, 2)]
    theirs = [{"arm": "none, probability", "seed": seed, "knn": 0.1 * seed + 0.002 * seed} for seed in (0, 1)]
    lines = image_tables.pairs({"rows": ours + theirs}).splitlines()
    assert lines[2] == "| vMF, responsibilities | none, probability | 2 | +0.90±0.10 |"
    assert lines[3] == "| none, probability | none, logit | 0 | – |"
