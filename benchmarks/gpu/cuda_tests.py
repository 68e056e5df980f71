"""The tests' cases for a device: the same parametrised tests that a machine without a GPU runs on its CPU."""

import importlib.util
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.gpu.job import ROOT, Job

NAMES = {"cuda": "cuda or gpu", "cpu": "cpu"}  # what the id of a case has, or the name of a test that needs a GPU
MOST_PROCESSES = 8  # each has a CUDA context of its own


def run(job: Job) -> list[str]:
    """Run them, in several processes where pytest-xdist is installed; returns what failed."""
    import pytest

    os.chdir(ROOT)
    arguments = ["-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-k", NAMES[job.device]]
    processes = min(MOST_PROCESSES, (os.cpu_count() or 1) // 2)
    if importlib.util.find_spec("xdist") is not None and processes > 1:
        arguments += [f"--numprocesses={processes}"]
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # in each of them
    outcomes = Outcomes(job)
    code = int(pytest.main([*arguments, *map(str, files())], plugins=[outcomes]))
    outcomes.write()
    failed = [name for name, outcome in outcomes.of_test.items() if outcome == "failed"]
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, Outcomes.NO_TIME):
        failed.append(f"pytest ended with exit code {code}: its output says why")
    return failed


def files() -> list[Path]:
    """The files with such cases: they take their devices from tests/devices.py."""
    found = sorted((ROOT / "tests").glob("test_*.py"))
    return [path for path in found if "from devices import DEVICES" in path.read_text()]


class Outcomes:
    """A plugin of pytest that keeps what became of every test in the result file, and ends the run when time is up."""

    NO_TIME = 100  # as an exit code

    def __init__(self, job: Job) -> None:
        self.job = job
        self.of_test: dict[str, str] = {}
        self.is_complete = True

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note the outcome of a phase of a test, of which the worst counts."""
        if report.when == "call" or report.outcome != "passed":
            self.of_test[report.nodeid] = report.outcome

    def pytest_runtest_logfinish(self) -> None:
        """Write after every test, so that what is known survives whatever the next one does."""
        import pytest

        self.write()
        if self.job.is_over():
            self.is_complete = False
            pytest.exit("no time was left for the other tests", returncode=self.NO_TIME)

    def write(self) -> None:
        """Write tests_DEVICE_DATE.json: the counts, and every test that did not pass."""
        counts = Counter(self.of_test.values())
        rows = [{"test": name, "outcome": outcome} for name, outcome in self.of_test.items() if outcome != "passed"]
        settings = {"python": sys.version.split()[0], "counts": dict(counts), "complete": self.is_complete}
        results.write("tests", self.job.device, rows, folder=self.job.results, **settings)
