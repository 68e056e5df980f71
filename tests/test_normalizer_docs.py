"""docs/numerics.md and the docstring quote what the result files hold."""

from benchmarks.normalizer import report


def test_numerics_page_shows_the_committed_results():
    text = report.DOCS.read_text()
    assert report.rendered(text) == text, "run `python -m benchmarks normalizer --accuracy-only`"


def test_the_docstring_shows_the_committed_results():
    text = report.SOURCE.read_text()
    assert "not finite: 0 of" in text
    assert report.with_accuracy(text) == text, "run `python -m benchmarks normalizer --accuracy-only`"
