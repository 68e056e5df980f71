"""What a command says about an error, and which errors keep their traceback."""

import errno
import multiprocessing.connection
import os
import signal
from pathlib import Path

import pytest
import torch

from runtime.failure import Failure, explain
from runtime.lanes import JobFailed
from training.collapse import TrainingCollapsed


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("`p` (=1) must be an integer >= 2"), "`p` (=1) must be an integer >= 2"),
        (ValueError("of another recipe:\n  seed: 0"), "of another recipe:\n  seed: 0"),
        (ValueError(), "ValueError"),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), "Permission denied: runs"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some space"),
        (ImportError("pip install 'vmf_heads[hub]'"), "pip install 'vmf_heads[hub]'"),
        (FloatingPointError("step 2: the loss is nan"), "step 2: the loss is nan"),
        (TrainingCollapsed("step 9: collapse"), "step 9: collapse"),
        (JobFailed("a, pretraining: exit status 2"), "a, pretraining: exit status 2"),
        (MemoryError("Unable to allocate 9 TiB"), "not enough memory (Unable to allocate 9 TiB): use smaller batches"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "not enough memory (CUDA out of memory. Tried)"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "DataLoader worker (pid 7) is killed by signal: Killed. Often the memory ran out",
        ),
        (
            RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
            "DataLoader worker (pid(s) 7) exited unexpectedly. Often the memory ran out",
        ),
        (RuntimeError("[pair.cc:547] Connection closed by peer [10.0.0.1]:1"), "another process of this command ended"),
        (TypeError("a defect"), None),
        (KeyError("a defect"), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    ],
)
def test_what_is_said(error: Exception, expected: str | None) -> None:
    found = explain(error)
    assert found == expected or (expected and found and found.startswith(expected))


def test_failures_are_errors_as_any_other() -> None:
    assert issubclass(Failure, RuntimeError)


class Broken(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        raise OSError("cannot read the image 'a.png': truncated")


def test_an_error_of_a_loader_process_comes_without_that_process_traceback() -> None:
    with pytest.raises(OSError, match="Traceback") as caught:
        next(iter(torch.utils.data.DataLoader(Broken(), num_workers=1)))
    assert explain(caught.value) == "cannot read the image 'a.png': truncated"


class Killed(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_loader_process_that_was_killed_is_told() -> None:
    with pytest.raises(RuntimeError, match="DataLoader worker") as caught:
        next(iter(torch.utils.data.DataLoader(Killed(), num_workers=1)))
    assert "Often the memory ran out: use fewer --num-workers" in (explain(caught.value) or "")


def test_a_loader_process_that_was_killed_before_its_batch_was_taken_over_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No such file") as caught:
        multiprocessing.connection.Client(str(tmp_path / "socket"))
    assert (explain(caught.value) or "").startswith(
        "a loader process ended ([Errno 2] No such file or directory). Often"
    )


def test_a_real_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No such file") as caught:
        (tmp_path / "nowhere" / "file").write_text("")
    assert explain(caught.value) == f"No such file or directory: {tmp_path / 'nowhere' / 'file'}"
