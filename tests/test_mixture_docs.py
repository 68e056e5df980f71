"""docs/mixture.md shows what the result files hold, and its example runs."""

import re

from benchmarks import mixture_docs


def test_the_page_shows_the_committed_results():
    text = mixture_docs.DOCS.read_text()
    assert all(f"<!-- table: {name} -->" in text for name in mixture_docs.TABLES)
    assert mixture_docs.rendered(text) == text, "run `python -m benchmarks concentration` and `mixture-fit`"


def test_the_example_runs():
    (example,) = re.findall(r"^```python\n(.*?)^```$", mixture_docs.DOCS.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)
    assert names["points"].shape == (100, 32)
