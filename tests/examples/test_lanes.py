"""Commands side by side: order, failure, interruption, what is shown."""

import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from runtime.lanes import Job, JobFailed, last_row, run_lanes

EXAMPLES = Path(__file__).parents[2] / "examples" / "vit_ssl"

# For commands that wait for something: they fail when it does not come, so that no test hangs.
WAIT = """
import pathlib, sys, time

def wait_for(path, seconds=60):
    deadline = time.monotonic() + seconds
    while not pathlib.Path(path).exists():
        if time.monotonic() > deadline:
            sys.exit(f"{path} did not appear")
        time.sleep(0.01)
"""


def python(code, tmp_path, title="job", **kwargs):
    return Job(title, [sys.executable, "-c", textwrap.dedent(code)], tmp_path / "log.txt", **kwargs)


def test_jobs_of_a_lane_run_in_order_and_append_to_its_log(tmp_path):
    stream = io.StringIO()
    run_lanes({"a": [python("print('first')", tmp_path), python("print('second')", tmp_path)]}, stream=stream)
    assert (tmp_path / "log.txt").read_text() == "first\nsecond\n"
    assert stream.getvalue().splitlines()[-1] == "a: done"


def test_lanes_run_at_the_same_time(tmp_path):
    # Each waits for a file that the other one writes; of two that run one after the other the first fails.
    def meet(mine, other):
        return (
            WAIT
            + f"""
pathlib.Path({str(tmp_path / mine)!r}).touch()
wait_for({str(tmp_path / other)!r})
print("met")
"""
        )

    lanes = {"a": [python(meet("x", "y"), tmp_path / "a")], "b": [python(meet("y", "x"), tmp_path / "b")]}
    run_lanes(lanes, stream=io.StringIO())
    assert [(tmp_path / label / "log.txt").read_text() for label in "ab"] == ["met\n", "met\n"]


def test_commands_get_one_thread(tmp_path):
    run_lanes({"a": [python("import os; print(os.environ['OMP_NUM_THREADS'])", tmp_path)]}, stream=io.StringIO())
    assert (tmp_path / "log.txt").read_text() == "1\n"


def test_a_failure_shows_the_end_of_the_log_and_stops_the_others(tmp_path):
    late = tmp_path / "late"
    failing = python("import sys; sys.exit('the reason')", tmp_path, title="breaking")
    waiting = python(f"import time; time.sleep(120); open({str(late)!r}, 'w')", tmp_path / "b")
    with pytest.raises(JobFailed, match=r"(?s)a, breaking: exit status 1.*the reason"):
        run_lanes({"a": [failing, waiting], "b": [waiting]}, stream=io.StringIO())
    assert not late.exists()  # nothing waited for the end of its sleep


def test_a_failure_that_the_command_explained_is_told_in_its_words(tmp_path):
    code = "import sys; print('a progress bar'); sys.exit('job.py: error: the disk is full')"
    with pytest.raises(JobFailed, match="exit status 1") as caught:
        run_lanes({"a": [python(code, tmp_path)]}, stream=io.StringIO())
    reason = f"job.py: error: the disk is full\n(from {tmp_path / 'log.txt'})"
    assert str(caught.value) == f"a, job: exit status 1; {reason}"


def test_progress_is_read_from_the_metrics(tmp_path):
    metrics, shown = tmp_path / "metrics.jsonl", tmp_path / "shown"

    class Stream(io.StringIO):
        def write(self, text):
            if "75%" in text:
                shown.touch()  # now the job may end
            return super().write(text)

    code = (
        WAIT
        + f"""
pathlib.Path({str(metrics)!r}).write_text('{{"step": 30, "loss": 1.25}}\\n{{"step": 31, "lo')
wait_for({str(shown)!r})
"""
    )
    stream = Stream()
    run_lanes({"DINO": [python(code, tmp_path, metrics=metrics, steps=40)]}, stream=stream, log_seconds=0.1)
    assert "DINO: job:  75%" in stream.getvalue()
    assert "30/40" in stream.getvalue()
    assert "loss 1.250" in stream.getvalue()


def test_last_row_needs_a_finished_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert last_row(None) == last_row(path) == {}
    path.write_text('{"step": 1')
    assert last_row(path) == {}
    path.write_text('{"step": 1}\n' * 2000 + '{"step": 2}\n{"ste')
    assert last_row(path) == {"step": 2}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_and_waited_for(tmp_path, signum):
    child = f"""
        import pathlib, signal, sys, time
        def stop(*_):
            time.sleep(0.5)  # which is waited for
            pathlib.Path({str(tmp_path / "saved")!r}).touch()
            sys.exit(143)
        signal.signal(signal.SIGTERM, stop)
        pathlib.Path({str(tmp_path / "ready")!r}).touch()
        time.sleep(120)
    """
    parent = f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(EXAMPLES)!r})
        from runtime.lanes import Job, run_lanes
        command = [sys.executable, "-c", {textwrap.dedent(child)!r}]
        run_lanes({{"a": [Job("job", command, Path({str(tmp_path / "log")!r}))]}})
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(parent)])
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "ready").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signum)
        assert process.wait(timeout=100) == 128 + signum
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "saved").exists()
