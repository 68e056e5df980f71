"""How a command ends: what it says, its exit status, its exit handlers, and how a process of torchrun does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

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


def run(ending: str, tmp_path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "RANK"}
    inherited["PYTHONPATH"] = str(Path(module.__file__).parents[1])
    (script := tmp_path / "program.py").write_text(PROGRAM.format(ending=ending))
    command = [sys.executable, str(script), str(tmp_path / "log"), *options]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("ending", "status", "error"),
    [
        ("pass", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(143)", 143, ""),
        ("sys.exit('the reason')", 1, "the reason\n"),
        ("raise ValueError('the reason')", 2, "program.py: error: the reason\n"),
        ("raise TypeError('a defect')", 1, "TypeError: a defect\n"),
        ("raise KeyboardInterrupt", 130, ""),
    ],
)
def test_a_process_of_torchrun_ends_with_its_own_status(ending: str, status: int, error: str, tmp_path: Path) -> None:
    done = run(ending, tmp_path, RANK="0")
    assert done.returncode == status, done.stderr
    assert done.stdout == "a line without an enda handler of the block\n"
    assert done.stderr.endswith(error)
    assert done.stderr == error or "TypeError" in error  # whose traceback comes first
    assert (tmp_path / "log").read_text() == "WARNING:root:in the log file\n"


def test_a_process_alone_ends_as_any_other(tmp_path: Path) -> None:
    assert run("pass", tmp_path).returncode == -signal.SIGABRT  # os.abort was reached


WITHOUT_ABORT = "atexit.unregister(os.abort)\n    "


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    failing = WITHOUT_ABORT + "raise ValueError('the reason')"
    told, shown = run(failing, tmp_path), run(failing, tmp_path, "--debug")
    assert (told.returncode, told.stderr) == (2, "program.py: error: the reason\n")
    assert shown.returncode == 1
    assert shown.stderr.startswith("Traceback")
    assert shown.stderr.endswith("ValueError: the reason\n")


def test_ctrl_c_is_quiet_in_the_block_and_among_the_imports_before_it(tmp_path: Path) -> None:
    # Python's own handler is set because a background job, as tests may be, is started with SIGINT ignored.
    interrupt = "import signal; signal.signal(2, signal.default_int_handler); os.kill(os.getpid(), 2)"
    for program in (WITHOUT_ABORT + interrupt, f"pass\n\natexit.unregister(os.abort)\n{interrupt}"):
        done = run(program, tmp_path)
        assert (done.returncode, done.stderr) == (-signal.SIGINT, ""), program  # which a shell sees, and ends its loop


def test_processes_of_torchrun_say_the_same_thing_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # As torchrun's agent has one; a line of its own address, which is where an error comes from, is told in any case.
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {"RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port)}.items():
        monkeypatch.setenv(name, value)
    for line in ("one", "one", "two", "one"):
        module._say_once(line)
    assert capsys.readouterr().err == "one\ntwo\n"
    monkeypatch.setenv("MASTER_PORT", "0")
    module._say_once("one")
    assert capsys.readouterr().err == "one\n"
