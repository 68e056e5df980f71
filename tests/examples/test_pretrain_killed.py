"""Runs that are stopped from outside, in whole processes: SIGKILL while saving, SIGTERM to one of four ranks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pretrain
from pretrain import Options
from tiny_run import STEPS_PER_EPOCH, TINY_RUN
from training.checkpoint_file import CHECKPOINT
from training.log import METRICS
from training.run import load_checkpoint

TINY = (*TINY_RUN, "epochs=20", "save_every=1")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
ENVIRONMENT["PYTHONPATH"] = str(Path(pretrain.__file__).parent)

# The third save is the one at the end of the second epoch.
DIES_WHILE_SAVING = """
import io, os, signal, sys
from pathlib import Path
import torch
import pretrain

save, saves = torch.save, []

def half(state, file):
    saves.append(state)
    if len(saves) < 3:
        return save(state, file)
    save(state, whole := io.BytesIO())
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = half
pretrain.main(pretrain.Options("photos_dino_vmf", Path(sys.argv[1]), overrides=tuple(sys.argv[2:]), collapse_window=0))
"""


@pytest.fixture(autouse=True)
def on_one_core(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # runs are compared bit by bit
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(output: Path, overrides: tuple[str, ...], max_steps: int, *, resume: bool = False) -> None:
    # So small a network may well collapse, which is not what is asked here.
    options = {"max_steps": max_steps, "resume": resume, "collapse_window": 0}
    pretrain.main(Options("photos_dino_vmf", output, overrides=overrides, **options))


def rows(output: Path) -> list[dict[str, Any]]:
    log = [json.loads(line) for line in (output / METRICS).read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("seconds", "images_per_second")} for row in log]


@pytest.mark.slow
def test_killed_while_saving_and_resumed_at_the_last_whole_checkpoint(tmp_path: Path) -> None:
    overrides, last = (*TINY, "drop_path=0.2"), STEPS_PER_EPOCH + 5
    run(tmp_path / "whole", overrides, last)
    output = tmp_path / "killed"
    command = [sys.executable, "-c", DIES_WHILE_SAVING, str(output), *overrides]
    killed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (output / f"{CHECKPOINT}.partial").stat().st_size < 0.6 * (output / CHECKPOINT).stat().st_size
    assert len(rows(output)) == 2 * STEPS_PER_EPOCH
    assert load_checkpoint(output)["step"] == STEPS_PER_EPOCH
    run(output, overrides, last, resume=True)
    assert rows(output) == rows(tmp_path / "whole")


# The second rank gets a SIGTERM in its fifth step.
SECOND_RANK_IS_TOLD_TO_STOP = f"""
import os, runpy, signal
from torch.optim.optimizer import register_optimizer_step_post_hook

steps = []

def interrupt(*_):
    steps.append(1)
    if len(steps) == 5 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)

register_optimizer_step_post_hook(interrupt)
runpy.run_path({pretrain.__file__!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_one_process_then_four_ranks_of_which_one_is_told_to_stop_then_two_then_one(tmp_path: Path) -> None:
    """The prototypes are whole at first, are cut over four ranks, over two, and are whole in the end."""
    output = tmp_path / "ranks"
    (script := tmp_path / "told_to_stop.py").write_text(SECOND_RANK_IS_TOLD_TO_STOP)

    def torchrun(ranks: int, script: str | Path, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += [str(script), "--recipe", "photos_dino_vmf", "--output", str(output), "--strategy", "fsdp2"]
        command += ["--prototype-parallel", str(ranks), "--collapse-window", "0", *options, "--set", *TINY]
        return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)

    run(output, TINY, 2)
    stopped = torchrun(4, script, "--resume", "--tensorboard")
    assert stopped.returncode != 0, stopped.stderr  # so that a batch system does not think it finished
    assert f"exitcode  : {128 + signal.SIGTERM} " in stopped.stderr
    assert load_checkpoint(output)["step"] == 7
    assert stopped.stdout.count(f"SIGTERM: saved step 7 in {output}; continue with --resume") == 1
    assert [row["step"] for row in rows(output)] == [1, 2, 3, 4, 5, 6, 7]
    assert list((output / "tensorboard").iterdir())

    continued = torchrun(2, pretrain.__file__, "--resume", "--max-steps", "9")
    assert continued.returncode == 0, continued.stderr
    run(output, TINY, 11, resume=True)
    run(tmp_path / "whole", TINY, 11)
    ours, theirs = ([row["loss"] for row in rows(folder)] for folder in (output, tmp_path / "whole"))
    assert len(ours) == 11
    assert ours[:5] == pytest.approx(theirs[:5], rel=1e-4)
    # Rounding grows from step to step, but another batch or centre would be far off.
    assert ours[5:] == pytest.approx(theirs[5:], rel=0.05)
