import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

import pretrain
from devices import DEVICES
from evaluators.features.encoder import open_encoder
from evaluators.request import ExtractOptions, Request, open_evaluation
from methods.backbone import cls_token
from pretrain import Options
from storage.lock import FolderInUse
from storage.torch_file import UnreadableFile
from tiny_run import STEPS_PER_EPOCH, TINY_RUN
from training import session
from training.collapse import TrainingCollapsed
from training.log import METRICS
from training.run import load_checkpoint, load_run

TINY = (*TINY_RUN, "epochs=2", "drop_path=0.2", "freeze_last_layer_epochs=0", "save_every=1")


@pytest.fixture
def device() -> str:
    return "cpu"


@pytest.fixture(autouse=True)
def on_one_core(device: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    if device == "cpu":  # also where there is a GPU, on which the same run has other last bits
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of a sum, and so its last bits, depend on the number of threads
    yield
    torch.set_num_threads(threads)


def run(output: Path, *overrides: str, recipe: str = "photos_dino_vmf", **options: Any) -> list[dict[str, Any]]:
    pretrain.main(Options(recipe, output, overrides=(*TINY, *overrides), **options))
    return rows(output)


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / METRICS).read_text().splitlines()]


def without_timing(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in ("seconds", "images_per_second")} for row in log]


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_leaves_rows_checkpoint_and_backbone(device: str, tmp_path: Path) -> None:
    log = run(tmp_path, max_steps=3)
    assert [row["step"] for row in log] == [1, 2, 3]
    for row in log:
        assert all(math.isfinite(value) for value in row.values())
        assert row["loss"] == pytest.approx(row["target_entropy"] + row["kl"], abs=1e-5)
        assert 0 <= row["target_entropy"] <= row["marginal_entropy"] <= math.log(32) + 1e-5
        assert row["kappa_min"] <= row["kappa_p05"] <= row["kappa_p50"] <= row["kappa_p95"] <= row["kappa_max"]
        assert row["teacher_temp"] == 0.04
    assert log[0]["lr"] == pytest.approx(0.01 * 32 / 256)
    trained = load_run(tmp_path)
    assert (trained.step, trained.epoch) == (3, 0)
    assert (tmp_path / "recipe.yaml").is_file()


def test_the_exported_backbone_opens_with_automodel(tmp_path: Path) -> None:
    run(tmp_path, max_steps=2)
    images = torch.randn(4, 3, 16, 16)
    exported = AutoModel.from_pretrained(tmp_path / "backbone").eval()
    with torch.no_grad():
        ours = cls_token(load_run(tmp_path).backbone, images)
        theirs = exported(images).last_hidden_state[:, 0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    torch.testing.assert_close(open_encoder(tmp_path / "backbone").cls(images), ours, rtol=0, atol=0)


def test_transformers_alone_gives_the_features_that_are_evaluated(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    photos = tmp_path / "data" / "train" / "one"
    photos.mkdir(parents=True)
    for index, (width, height) in enumerate([(16, 16), (37, 24), (20, 41), (300, 200)] * 10):
        Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8)).save(photos / f"{index:02}.png")
    run(tmp_path / "run", "dataset=folder", data=tmp_path / "data", max_steps=1, export_program=True)
    request = Request(str(tmp_path / "run"), extract=ExtractOptions(num_workers=0, cache=False))
    ours = torch.from_numpy(open_evaluation(request).features("train").x)
    capfd.readouterr()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run" / "backbone")
    model = AutoModel.from_pretrained(tmp_path / "run" / "backbone")
    said = capfd.readouterr()
    assert "pooler" not in said.out + said.err
    images = processor([Image.open(path) for path in sorted(photos.iterdir())], return_tensors="pt")
    with torch.no_grad():
        theirs = model(**images)
        program = torch.export.load(tmp_path / "run" / "backbone.pt2").module()
        exported = [program(images["pixel_values"][rows]) for rows in (slice(0, 1), slice(0, 40))]
    close = {"rtol": 0, "atol": 5e-6}  # of the rounding of the normalisation; values are up to 3
    torch.testing.assert_close(theirs.pooler_output, ours, **close)
    torch.testing.assert_close(theirs.last_hidden_state[:, 0], theirs.pooler_output, rtol=0, atol=0)
    torch.testing.assert_close(exported[0], ours[:1], **close)
    torch.testing.assert_close(exported[1], ours, **close)
    assert ours.std(dim=0).mean() > 0.01


def test_a_flipped_bit_in_the_exported_backbone_is_told(tmp_path: Path) -> None:
    run(tmp_path, max_steps=1)
    for name in ("model.safetensors", "config.json", "SHA256SUMS"):
        path = tmp_path / "backbone" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-40] + bytes([whole[-40] ^ 4]) + whole[-39:])  # of a weight in model.safetensors
        with pytest.raises(UnreadableFile, match=rf"is damaged.*{name}|{name} is damaged"):
            open_encoder(tmp_path / "backbone")
        path.write_bytes(whole)
    open_encoder(tmp_path / "backbone")


def test_the_same_seed_gives_the_same_run_and_another_another(tmp_path: Path) -> None:
    first, second = (without_timing(run(tmp_path / name, max_steps=3)) for name in "ab")
    assert first == second
    assert run(tmp_path / "c", max_steps=3, seed=1)[0]["loss"] != first[0]["loss"]


def test_loader_workers_do_not_change_the_run(tmp_path: Path) -> None:
    here = run(tmp_path / "here", max_steps=2)
    assert without_timing(run(tmp_path / "workers", "num_workers=2", max_steps=2)) == without_timing(here)


@pytest.mark.parametrize("centering", ["logit", "probability"])
@pytest.mark.parametrize("normalization", ["none", "l2", "vmf"])
def test_each_cell_of_table_1_trains(normalization: str, centering: str, tmp_path: Path) -> None:
    cell = (f"normalization={normalization}", f"centering={centering}")
    first, second = run(tmp_path, *cell, max_steps=2)
    # All six agree while every prototype has norm 1 and the centre is 0; then only L2 keeps kappa at 1/0.1.
    reference = run(tmp_path / "reference", "normalization=none", "centering=logit", max_steps=1)[0]
    assert first["loss"] == pytest.approx(reference["loss"], rel=1e-5)
    assert math.isfinite(second["loss"])
    if normalization == "l2":
        assert second["kappa_min"] == second["kappa_max"] == pytest.approx(10)
    else:
        assert second["kappa_min"] < 10 < second["kappa_max"]
    centre = "loss.center" if centering == "logit" else "loss.log_center"
    assert load_checkpoint(tmp_path)["method"][centre].abs().max() > 0


def test_a_frozen_last_layer_moves_after_its_epochs(tmp_path: Path) -> None:
    frozen = run(tmp_path, "freeze_last_layer_epochs=1", "batch_size=512")
    assert [row["kappa_min"] == row["kappa_max"] for row in frozen] == [True, True, True, False]


def test_a_run_in_two_parts_is_the_whole_run(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", max_steps=6)
    run(tmp_path / "parts", max_steps=2)
    log = tmp_path / "parts" / METRICS
    log.write_text(log.read_text() + '{"step": 3, "loss": 0}\n{"step": 4, "lo')  # as a killed process leaves it
    resumed = run(tmp_path / "parts", max_steps=6, resume=True)
    assert without_timing(resumed) == without_timing(whole)
    assert [row["seconds"] for row in resumed] == sorted(row["seconds"] for row in resumed)
    ours, theirs = (load_checkpoint(tmp_path / name)["method"] for name in ("parts", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# Sends a signal to its own group (its loader processes, too, as torchrun and a terminal do) in the fifth step.
INTERRUPTS_ITSELF = """
import os, runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook

signum, script = int(sys.argv[1]), sys.argv[2]
steps = []

def interrupt(*_):
    steps.append(1)
    if len(steps) == 5:
        os.killpg(os.getpgrp(), signum)

register_optimizer_step_post_hook(interrupt)
sys.argv = sys.argv[2:]
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_in_the_middle_of_an_epoch_and_resumed(signum: signal.Signals, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", max_steps=STEPS_PER_EPOCH + 3)
    output = tmp_path / "interrupted"
    command = [sys.executable, "-c", INTERRUPTS_ITSELF, str(int(signum)), pretrain.__file__]
    command += ["--recipe", "photos_dino_vmf", "--output", str(output), "--num-workers", "2", "--set", *TINY]
    path = os.pathsep.join([str(Path(pretrain.__file__).parent), os.environ.get("PYTHONPATH", "")])
    stopped = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=300,
    )
    assert stopped.returncode == 128 + signum, stopped.stderr
    assert load_checkpoint(output)["step"] == 5
    assert f"{signum.name}: saved step 5 in {output}; continue with --resume" in stopped.stdout
    assert len(rows(output)) == 5
    resumed = run(output, max_steps=STEPS_PER_EPOCH + 3, resume=True)
    assert without_timing(resumed) == without_timing(whole)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    message = r"step 2: the loss is (nan|inf); .* a smaller `lr` \(=1e\+36\).* keeps the checkpoint of step 0"
    with pytest.raises(FloatingPointError, match=message):
        run(tmp_path, "lr=1e36")
    state = load_checkpoint(tmp_path)
    assert state["step"] == 0
    assert all(value.isfinite().all() for value in state["method"].values())
    assert [row["step"] for row in rows(tmp_path)] == [1]


def test_a_run_made_to_collapse_is_stopped(tmp_path: Path) -> None:
    # A centre that never moves is no centring.
    message = r"step \d+: collapse, for 40 steps now: one prototype.*`center_momentum`.* keeps the checkpoint of step"
    with pytest.raises(TrainingCollapsed, match=message):
        run(tmp_path, "center_momentum=1", "epochs=8", collapse_window=40)
    log = rows(tmp_path)
    entropies = [row["marginal_entropy"] for row in log]
    assert entropies[-1] < 0.5 * entropies[0]
    assert load_checkpoint(tmp_path)["step"] <= len(log) - 39  # of an epoch's end before it looked collapsed


def test_a_run_that_learns_is_not_stopped(tmp_path: Path) -> None:
    # What `make demo` trains, shortened, with a window that leaves nothing to chance.
    pretrain.main(Options("photos_dino_vmf", tmp_path, max_steps=25, collapse_window=2, overrides=("warmup_epochs=0",)))
    assert len(rows(tmp_path)) == 25


def test_fewer_rows_are_written_on_request(tmp_path: Path) -> None:
    assert [row["step"] for row in run(tmp_path / "some", max_steps=5, log_every=2)] == [2, 4, 5]
    assert [row["step"] for row in run(tmp_path / "some", max_steps=8, log_every=3, resume=True)] == [2, 4, 5, 6, 8]


def test_accumulated_micro_batches_make_the_same_run(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", "drop_path=0", max_steps=3)
    parts = run(tmp_path / "parts", "drop_path=0", max_steps=3, accumulate=4)
    for name in ("loss", "grad_norm", "target_entropy", "kl", "center_entropy"):
        assert [row[name] for row in parts] == pytest.approx([row[name] for row in whole], rel=1e-3)
    assert [row["prototypes_used"] for row in parts] < [row["prototypes_used"] for row in whole]  # of 8 images each


def test_an_output_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    run(tmp_path, max_steps=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match=r"`output` \(=.*\) already holds a run \(checkpoint.pt\)"):
        run(tmp_path, max_steps=2)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_resuming_with_another_recipe_names_the_fields(tmp_path: Path) -> None:
    run(tmp_path, max_steps=1)
    message = r"has another recipe:\n  seed: 0 in the run, 5 requested\n  epochs: 2 in the run, 3 requested"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "epochs=3", seed=5, resume=True)


def test_resuming_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`output` \(=.*nowhere'\) must be the folder of a run, with --resume"):
        run(tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*empty.checkpoint.pt"):
        run(tmp_path / "empty", resume=True)


def test_a_full_disk_ends_the_run_with_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(directory: Path, state: dict[str, Any]) -> None:
        if state["step"] == STEPS_PER_EPOCH:
            (directory / "checkpoint.pt.partial").symlink_to("/dev/full")
        save(directory, state)

    save = session.save_checkpoint
    monkeypatch.setattr(session, "save_checkpoint", full)
    message = r"step 33: No space left on device: .*checkpoint.pt; free some space. .* keeps the checkpoint of step 0$"
    with pytest.raises(OSError, match=message):
        run(tmp_path)
    assert load_checkpoint(tmp_path)["step"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint.pt",
        "data.json",
        "images.txt.gz",
        METRICS,
        "recipe.yaml",
    ]


def test_a_second_run_does_not_write_into_the_same_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked_elsewhere(_folder: Path) -> None:
        raise FolderInUse("`output` is being written by process 7")

    monkeypatch.setattr(session, "locked", locked_elsewhere)
    with pytest.raises(FolderInUse, match="is being written by process 7"):
        run(tmp_path, max_steps=1)
    assert not any(tmp_path.iterdir())


def test_a_run_that_was_killed_before_its_first_checkpoint_can_be_started_again(tmp_path: Path) -> None:
    for name in (".lock", "checkpoint.pt.partial"):
        (tmp_path / name).write_text("of a process that was killed")
    run(tmp_path, max_steps=1)
    (tmp_path / "recipe.yaml").unlink()  # as when it was killed right after its first checkpoint
    run(tmp_path, max_steps=2, resume=True)
    assert (tmp_path / "recipe.yaml").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("backbone", "checkpoint.previous.pt", "checkpoint.pt", "data.json", "heads", "images.txt.gz"),
        *(METRICS, "recipe.yaml"),
    ]


def test_a_folder_is_enough_and_a_run_is_resumed_from_itself_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(40):
        (tmp_path / "data" / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (index, 0, 0)).save(tmp_path / "data" / "ab"[index % 2] / f"{index}.png")
    tiny = tuple(setting for setting in TINY if not setting.startswith("dataset"))  # the recipe's is photos
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.source.check.SECONDS", math.inf)
    pretrain.main(Options("photos_dino_vmf", Path("whole"), data=Path("data"), overrides=tiny))
    pretrain.main(Options("photos_dino_vmf", Path("parts"), data=Path("data"), overrides=tiny, max_steps=1))
    said = capsys.readouterr().out
    assert said.startswith("40 images in 2 classes, 20 in each\n  40 of them looked at: 20 x 20 px; modes: RGB 40\n")
    assert "loss: " in said
    assert "of 32 are the largest target" in said
    assert "in whole: backbone/ (the teacher's, for AutoModel and AutoImageProcessor), heads/, metrics.jsonl" in said
    assert said.splitlines()[-1].endswith("evaluate.py compare parts")
    monkeypatch.chdir("/")
    pretrain.main(Options(output=tmp_path / "parts", resume=True))
    resumed, whole = (without_timing(rows(tmp_path / name)) for name in ("parts", "whole"))
    assert resumed == whole
    assert len(whole) == 2
    assert "images in 2 classes" not in capsys.readouterr().out
    (tmp_path / "data").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"`data` \(='.*data'\) is not a folder"):
        pretrain.main(Options(output=tmp_path / "parts", resume=True))
    pretrain.main(Options(output=tmp_path / "parts", resume=True, data=tmp_path / "moved"))
    with pytest.raises(ValueError, match=r"another recipe:\n  lr: 0.01 in the run, 0.5 requested"):
        pretrain.main(Options(output=tmp_path / "parts", resume=True, overrides=("lr=0.5",)))


def test_resuming_on_other_data_is_refused(tmp_path: Path) -> None:
    for index in range(40):
        (tmp_path / "data" / "one").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (index, 0, 0)).save(tmp_path / "data" / "one" / f"{index}.png")
    run(tmp_path / "run", "dataset=folder", data=tmp_path / "data", max_steps=1)
    (tmp_path / "data" / "one" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"`data` has changed .* began with 40 images: 1 gone \(one/0.png\)"):
        run(tmp_path / "run", "dataset=folder", data=tmp_path / "data", resume=True)


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ((), {"max_steps": 0}, r"`max_steps` \(=0\) must be at least 1"),
        ((), {"collapse_window": -1}, r"`collapse_window` \(=-1\) must be at least 0"),
        ((), {"accumulate": 0}, r"`accumulate` \(=0\) must be at least 1"),
        ((), {"accumulate": 5}, r"`batch_size` \(=32\) must be a multiple of 5: 1 processes x `accumulate` \(=5\)"),
        ((), {"strategy": "fsdp2"}, r"`strategy` \(='fsdp2'\) needs torchrun"),
        (("dataset=stream",), {"images_per_epoch": 0}, r"`images_per_epoch` \(=0\) must be at least 1"),
        ((), {"images_per_epoch": 9}, r"`images_per_epoch` \(=9\) is only for `dataset` 'stream'"),
        (("lr",), {}, r"`--set` \(='lr'\) must be FIELD=VALUE"),
        (("speed=1",), {}, r"unknown fields speed"),
        (("batch_size=4096",), {}, r"`batch_size` \(=4096\) must be at most the number of images \(=1077\)"),
        ((), {"data": Path("somewhere")}, r"`data` \(='somewhere'\) is only for the data sets 'folder' and 'hub'"),
    ],
)
def test_bad_options_leave_no_output(
    overrides: tuple[str, ...], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "output", *overrides, **options)
    assert not (tmp_path / "output").exists()
