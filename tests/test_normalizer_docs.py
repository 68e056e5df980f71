"""docs/numerics.md quotes what the result files hold."""

from benchmarks.normalizer import report


def test_numerics_page_shows_the_committed_results():
    text = report.DOCS.read_text()
    assert report.rendered(text) == text, "run `python -m benchmarks normalizer --accuracy-only`"
