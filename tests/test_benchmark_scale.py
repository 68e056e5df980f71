"""docs/scale.md shows the committed results, which the model meets within a tenth."""

import pytest
from benchmarks import results
from benchmarks.scale import report
from benchmarks.scale.model import GATHERED, REPLICATED, Cost, Setting, best_shards, cost

SETTING = Setting(prototypes=262_144, dim=512, ranks=64, student_rows=768, teacher_rows=128)


def test_the_page_shows_the_committed_results() -> None:
    text = (report.DOCS / "scale.md").read_text()
    assert report.rendered(text) == text, "run `python -m benchmarks scale`"
    assert text.count("<!-- table: ") == 2


def test_the_model_is_within_a_tenth_of_what_was_measured() -> None:
    result = results.latest("scale")
    rows = result["rows"]
    assert {(row["ranks"], row["shards"]) for row in rows} >= {(2, 2), (4, 4), (4, 2), (4, REPLICATED), (4, GATHERED)}
    for row in rows:
        model = cost(Setting(ranks=row["ranks"], **result["head"]), row["shards"])
        found = Cost(*(row[name] for name in Cost._fields))
        assert found == pytest.approx(model, rel=0.1), row


def test_memory_falls_with_the_number_of_shards() -> None:
    held = {(row["ranks"], row["shards"]): row["held"] for row in results.latest("scale")["rows"]}
    assert held[4, 4] == pytest.approx(held[2, 2] / 2, rel=0.01) == pytest.approx(held[4, REPLICATED] / 4, rel=0.01)


def test_the_best_number_of_shards_is_the_one_that_sends_the_least() -> None:
    sent = {shards: cost(SETTING, shards).sent for shards in (1, 2, 4, 8, 16, 32, 64)}
    assert best_shards(SETTING) == min(sent, key=sent.__getitem__)
    # One shard with 64 copies is a replicated head.
    assert sent[1] == cost(SETTING, REPLICATED).sent
