"""One process at a time writes into a folder, however the others ended."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage import lock as module
from storage.lock import LOCK, FolderInUse, locked

HOLDS = """
import os, sys, time
from pathlib import Path
from storage.lock import locked

with locked(Path(sys.argv[1])):
    child = os.fork()  # as a loader process, which outlives the one that holds the lock
    if child:
        print(child, flush=True)
    time.sleep(300)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"PYTHONPATH": str(Path(module.__file__).parents[1])}
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "run")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    yield process
    process.kill()
    process.wait()
    os.kill(child, signal.SIGKILL)
    process.stdout.close()


def test_a_second_process_is_told_who_writes_and_a_killed_one_locks_nothing(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    message = rf"`output` \(='.*run'\) is being written by process {holder.pid} on .* since 20.*: wait for its end, or"
    with pytest.raises(FolderInUse, match=message), locked(tmp_path / "run"):
        pass
    holder.kill()
    holder.wait()
    assert (tmp_path / "run" / LOCK).exists()
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).read_text().startswith(f"process {os.getpid()} on ")
        (tmp_path / "run" / "result").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["result"]


def test_a_folder_in_which_nothing_was_written_is_removed(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


def test_a_lock_on_a_file_that_is_gone_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def open_and_lose(path: Path, *arguments: int) -> int:
        opened.append(real(path, *arguments))
        if len(opened) == 1:  # the process that held the lock ends, and removes its file, before this one has locked it
            path.unlink()
        return opened[-1]

    real = os.open
    monkeypatch.setattr(module.os, "open", open_and_lose)
    with locked(tmp_path / "run"):
        assert len(opened) == 2
        assert os.path.samestat(os.fstat(opened[1]), (tmp_path / "run" / LOCK).stat())


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(module.fcntl, "lockf", refuse)
    with locked(tmp_path / "run"):
        assert "run cannot be locked here (Function not implemented): start no second" in capsys.readouterr().err
