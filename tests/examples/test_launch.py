"""The Slurm script, with stand-ins for Slurm's commands: what it starts, and that a stopped job is queued again."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "vit_ssl" / "launch" / "pretrain.sbatch"

# Each stand-in writes down how it was called. Training saves when it is told to stop, and ends with torchrun's status.
# As in Slurm a SIGTERM to srun kills its tasks outright, and scancel reaches them (here by SIGUSR1) as a SIGTERM.
SRUN = """#!/bin/bash
trap 'exit 137' TERM
trap 'sleep 0.2; touch "$SLURM_SUBMIT_DIR/saved"; exit 1' USR1
echo $$ > "$SLURM_SUBMIT_DIR/pid"
echo "$@" > "$SLURM_SUBMIT_DIR/srun"
for _ in $(seq "$SECONDS_OF_TRAINING"); do sleep 1 & wait $!; done
exit "$STATUS"
"""
SCANCEL = """#!/bin/bash
[ "$*" = "--signal=TERM 41234" ] && kill -USR1 "$(cat "$SLURM_SUBMIT_DIR/pid")"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'node7\\nnode8\\n'; exit; fi
[ -e "$SLURM_SUBMIT_DIR/saved" ] && echo "$@" > "$SLURM_SUBMIT_DIR/scontrol"
"""


def start(folder: Path, *, seconds: int = 0, status: int = 0) -> subprocess.Popen:
    commands = folder / "bin"
    commands.mkdir()
    for name, text in [("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)]:
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "41234", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"}
    slurm |= {"SLURM_CPUS_PER_TASK": "96", "SLURM_SUBMIT_DIR": str(folder)}
    slurm |= {"SECONDS_OF_TRAINING": str(seconds), "STATUS": str(status)}
    environment = {**os.environ, **slurm, "PATH": f"{commands}:{os.environ['PATH']}"}
    arguments = ["some_recipe", "runs/a", "data", "--strategy", "fsdp2"]
    return subprocess.Popen(["bash", str(SCRIPT), *arguments], env=environment)


@pytest.mark.parametrize("status", [0, 3])
def test_a_job_ends_as_its_training(tmp_path: Path, status: int) -> None:
    assert start(tmp_path, status=status).wait(timeout=60) == status
    called = (tmp_path / "srun").read_text()
    assert called.startswith("--cpus-per-task 96 .venv/bin/torchrun ")
    assert "--nnodes 2 --nproc-per-node gpu --rdzv-backend c10d --rdzv-id 41234 --rdzv-endpoint node7:21234" in called
    expected = "pretrain.py --recipe some_recipe --output runs/a --data data --strategy fsdp2"
    assert called.rstrip().endswith(expected)
    assert not (tmp_path / "scontrol").exists()


def test_a_job_out_of_time_saves_and_is_queued_again(tmp_path: Path) -> None:
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "checkpoint.pt").touch()
    job = start(tmp_path, seconds=60)
    deadline = time.monotonic() + 60
    while not (tmp_path / "srun").exists() or not (tmp_path / "srun").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) != 0
    assert (tmp_path / "scontrol").read_text() == "requeue 41234\n"  # after the training had saved
    assert "--data data --resume --strategy fsdp2" in (tmp_path / "srun").read_text()


def test_missing_arguments_are_named(tmp_path: Path) -> None:
    run = subprocess.run(["bash", str(SCRIPT), "some_recipe"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert "pretrain.sbatch RECIPE OUTPUT DATA" in run.stderr
