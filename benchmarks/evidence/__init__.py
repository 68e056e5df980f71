"""`python -m benchmarks evidence`: the tables and pictures of docs/evidence.md from the result files."""

from benchmarks.evidence import figures, report


def evidence() -> None:
    """Make the tables of docs/evidence.md and its pictures anew from the newest files in benchmarks/results/.

    The files come from `python -m benchmarks mixture` and `python -m benchmarks fashion`.
    """
    report.update_docs()
    figures.draw()
    print(report.DOCS)
