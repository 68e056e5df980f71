"""How a process of torchrun ends: its exit status, its output, its exit handlers, and no finalisation of Python."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import ending as module

# Python calls exit handlers in reverse order: os.abort stands for a gloo thread that aborts a later finalisation.
PROGRAM = """
import atexit, logging, os, sys
from runtime.ending import sound_ending

atexit.register(os.abort)
logging.basicConfig(handlers=[logging.FileHandler(sys.argv[1], delay=True)])

with sound_ending():
    atexit.register(print, "a handler of the block")
    logging.warning("in the log file")
    sys.stdout.write("a line without an end")
    {ending}
"""


def run(ending: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "RANK"}
    inherited["PYTHONPATH"] = str(Path(module.__file__).parents[1])
    command = [sys.executable, "-c", PROGRAM.format(ending=ending), str(tmp_path / "log")]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("ending", "status", "error"),
    [
        ("pass", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(143)", 143, ""),
        ("sys.exit('the reason')", 1, "the reason\n"),
        ("raise ValueError('the reason')", 1, "ValueError: the reason\n"),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt\n"),
    ],
)
def test_a_process_of_torchrun_ends_with_its_own_status(ending: str, status: int, error: str, tmp_path: Path) -> None:
    done = run(ending, tmp_path, RANK="0")
    assert done.returncode == status, done.stderr
    assert done.stdout == "a line without an enda handler of the block\n"
    assert done.stderr.endswith(error)
    assert ("Traceback" in done.stderr) == (ending.startswith("raise"))
    assert (tmp_path / "log").read_text() == "WARNING:root:in the log file\n"


def test_a_process_alone_ends_as_any_other(tmp_path: Path) -> None:
    assert run("pass", tmp_path).returncode < 0  # os.abort was reached
