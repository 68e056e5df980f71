"""`python -m benchmarks gpu`, rehearsed on a CPU: its stages, its summary, and which packages it needs."""

import ast
import math
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks import results
from benchmarks.gpu import command, cuda_tests, losses, normalizer, report, run, training_step
from benchmarks.gpu.job import ROOT, Job
from benchmarks.gpu.stages import STAGES, seconds
from benchmarks.loss import contenders, measure

PACKAGES = {"torch", "numpy", "scipy", "mpmath", "matplotlib", "pytest", "hypothesis"}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job("cpu", tmp_path, math.inf)


def test_a_rehearsal_leaves_result_files_figures_and_filled_pages(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {contenders.PLAIN: contenders.plain, contenders.FUSED: contenders.fused}  # none that is compiled
    monkeypatch.setattr(measure, "_contenders", lambda inputs: (dict(calls), {"absent": "not here"}))
    monkeypatch.setattr(measure, "peak", lambda call, device: 2**20)  # a profiler, which takes a second
    monkeypatch.setattr("benchmarks.step_costs.peak", measure.peak)
    started = time.time() - 10  # a file system's clock may lag
    for stage in (lambda job: losses.run(job, "float32"), losses.run_chunks, normalizer.run, training_step.run):
        assert stage(job) == []
    assert report.run(job) == []

    assert {path.name.split("_cpu_")[0] for path in job.results.iterdir()} == {
        *("loss", "chunks", "normalizer_accuracy", "training_step")
    }
    assert [path.name for path in job.images.iterdir()] == ["loss_chunks_cuda.svg"]
    loss, numerics = ((job.root / "docs" / page).read_text() for page in report.PAGES)
    assert report.NOTHING not in loss + numerics
    assert f"| float32 | {losses.TINY} | the head's parameters |" in loss
    assert "| crops × images, K | dtype | 1 | 2 |" in loss
    assert "| DINO-vMF, fused loss |" in loss
    assert "| vmf_heads | float64 |" in numerics
    summary = run.summary([run.Outcome("chunks", "stopped", 3.2)], job.root, started)
    assert "chunks: 3 s, STOPPED at its limit" in summary
    assert f"    2 of 2 cases\n    absent, {losses.TINY}: not here" in summary
    assert f"  {job.images / 'loss_chunks_cuda.svg'}" in summary


def test_a_case_that_fails_is_named_and_the_next_is_measured(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(size: object, **options: object) -> list[dict[str, object]]:
        if size == losses.TINY:
            raise torch.OutOfMemoryError("much too large\nand more")
        own = {"size": str(size), "start": "there", "contender": contenders.FUSED, "missing": "broken"}
        return [own, {**own, "contender": "another"}]

    monkeypatch.setattr(measure, "measure_case", measured)
    want = [f"{losses.TINY}, from the head's parameters: OutOfMemoryError: much too large"]
    want += [f"vMF, fused, {losses.TINY_PATCHES}, there: broken"]
    assert losses.run(job, "float32") == want
    result = results.latest("loss", "cpu", folder=job.results)
    assert result["failed"] == want
    assert run.what_happened(result)[:4] == ["2 rows", "1 of 2 cases", *want]
    assert run.what_happened(result)[4:] == [
        f"vMF, fused, {losses.TINY_PATCHES}: broken",
        f"another, {losses.TINY_PATCHES}: broken",
    ]


def test_nothing_begins_after_the_deadline(tmp_path: Path) -> None:
    job = Job("cpu", tmp_path, -math.inf)
    assert losses.run(job, "float32") == losses.run_chunks(job) == training_step.run(job) == []
    assert list(tmp_path.iterdir()) == []


def test_the_outcomes_of_tests_are_kept_after_each(tmp_path: Path) -> None:
    outcomes = cuda_tests.Outcomes(Job("cpu", tmp_path, math.inf))
    for name, when, outcome in (
        *(("a", "setup", "passed"), ("a", "call", "passed"), ("b", "setup", "skipped"), ("c", "call", "failed")),
        *(("d", "call", "passed"), ("d", "teardown", "failed")),
    ):
        outcomes.pytest_runtest_logreport(SimpleNamespace(nodeid=name, when=when, outcome=outcome))
    outcomes.pytest_runtest_logfinish()
    result = results.latest("tests", "cpu", folder=outcomes.job.results)
    assert run.what_happened(result) == ["2 failed, 1 passed, 1 skipped", "c", "d"]

    outcomes = cuda_tests.Outcomes(Job("cpu", tmp_path, -math.inf))
    outcomes.pytest_runtest_logreport(SimpleNamespace(nodeid="a", when="call", outcome="passed"))
    with pytest.raises(pytest.exit.Exception, match="no time was left for the other tests"):
        outcomes.pytest_runtest_logfinish()
    outcomes.write()
    result = results.latest("tests", "cpu", folder=outcomes.job.results)
    assert run.what_happened(result) == ["1 passed", "no time was left for the other tests"]


def test_a_stage_ends_at_its_limit_with_all_that_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run.run_stage("fine", ["true"], 600).state == "ran"
    assert run.run_stage("broken", ["false"], 600).state == "failed"
    pid = tmp_path / "pid"

    class Popen(subprocess.Popen):
        def wait(self, timeout: float | None = None) -> int:
            if timeout != 123:
                return super().wait(timeout)
            wait_until(lambda: pid.exists() and pid.read_text().endswith("\n"))
            raise subprocess.TimeoutExpired("sh", timeout)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    outcome = run.run_stage("slow", ["sh", "-c", f"sleep 600 & echo $! > {pid}; wait"], 123)
    assert (outcome.name, outcome.state) == ("slow", "stopped")
    wait_until(lambda: not is_alive(int(pid.read_text())))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def test_stages_run_in_their_order_and_hand_on_the_time_that_they_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[tuple[str, float]] = []

    def run_stage(name: str, arguments: list[str], limit: float) -> run.Outcome:
        assert arguments[1:4] == ["-m", "benchmarks", "gpu"]
        assert arguments[arguments.index("--only") + 1] == name
        assert 0 < float(arguments[arguments.index("--seconds") + 1]) < limit
        ran.append((name, limit))
        return run.Outcome(name, "failed" if name == "chunks" else "ran", 0.0)

    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: 0.0, time=time.time))
    monkeypatch.setattr(run, "run_stage", run_stage)
    assert run.run_all("cuda", tmp_path) == 1
    assert [name for name, _ in ran] == list(STAGES)
    total = 0.0
    for name, limit in ran:
        total += seconds(name, "cuda")
        assert limit == total
    assert total <= 600 - 10  # the command itself imports torch
    assert "chunks: 0 s, FAILED" in capsys.readouterr().out

    monkeypatch.setattr(run, "run_stage", lambda name, *_: run.Outcome(name, "ran", 0.0))
    assert run.run_all("cpu", tmp_path) == 0
    assert "loss-bfloat16" not in capsys.readouterr().out  # there is no autocast on the CPU


@pytest.mark.parametrize("page", report.PAGES)
def test_the_pages_show_the_committed_results_of_a_gpu(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    assert "<!-- table: gpu " in text
    assert report.rendered(text, report.finder()) == text, "run `python -m benchmarks gpu --only docs`"


def test_without_a_result_the_pages_say_so(tmp_path: Path) -> None:
    nothing = "<!-- table: gpu loss -->\n\nOn a GPU nothing has been measured yet.\n\n<!-- end -->"
    page = "<!-- table: gpu loss -->\n\n| old |\n\n<!-- end -->\n<!-- table: ratios -->\n\n| cpu |\n\n<!-- end -->"
    assert report.rendered(page, report.finder("cuda", tmp_path)) == nothing + page[page.index("\n<!-- table: r") :]


def test_a_gpu_is_asked_for_in_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        command.main([])
    assert "`--device` (=cuda) needs a GPU that torch sees" in capsys.readouterr().err

    def stage(job: Job) -> list[str]:
        assert (job.device, job.root) == ("cpu", tmp_path)
        return ["something"]

    monkeypatch.setitem(STAGES, "chunks", STAGES["chunks"]._replace(run=stage))
    assert command.main(["--device", "cpu", "--output", str(tmp_path), "--only", "chunks"]) == 1
    assert capsys.readouterr().err == "FAILED: something\n"


def test_the_command_is_found_where_the_packages_of_other_benchmarks_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("benchmarks", run_name="__main__")
    assert "a rehearsal with tiny sizes" in capsys.readouterr().out


def test_it_imports_no_other_packages_and_neither_do_the_tests_that_it_runs() -> None:
    tests = cuda_tests.files()
    assert {"test_cross_entropy.py", "test_special.py", "test_cross_entropy_errors.py"} <= {path.name for path in tests}
    todo = [ROOT / "benchmarks/gpu/command.py", ROOT / "tests/conftest.py", *tests]
    seen: dict[Path, str] = {path: "" for path in todo}
    while todo:
        path = todo.pop()
        for name in imported(path):
            file = module_file(name)
            package = name.partition(".")[0]
            if file is None and not (ROOT / "tests" / package).is_dir():
                assert package in PACKAGES or package in sys.stdlib_module_names, f"{path} imports {name}"
            elif file is not None and file not in seen:
                seen[file] = name
                todo.append(file)
    assert {"benchmarks.loss.peers", "benchmarks.timing", "vmf_heads.cross_entropy"} <= set(seen.values())


def imported(path: Path) -> list[str]:
    """What a file imports when it is itself imported: not what functions import, or what it tries to."""
    package = path.relative_to(ROOT / "src").parts[:-1] if ROOT / "src" in path.parents else ()
    names = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names if module_file(f"{base}.{alias.name}"))]
    return names


def module_file(name: str) -> Path | None:
    for root in (ROOT, ROOT / "src", ROOT / "tests"):
        path = root.joinpath(*name.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None
