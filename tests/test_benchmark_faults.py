"""What `python -m benchmarks faults` looks at after a kill: that it would see a broken promise."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from benchmarks import faults
from benchmarks.faults import PROMISES, state_of

from config.recipe import load_recipe
from methods.registry import build_method
from storage.lock import FolderInUse
from training.run import save_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    recipe = load_recipe("photos_dino_vmf", {"hidden_size": 16, "out_dim": 8, "num_hidden_layers": 1})
    method = build_method(recipe)
    save_checkpoint(tmp_path, {"recipe": recipe, "method": method.state_dict(), "step": 7, "epoch": 2})
    method.teacher.backbone.save_pretrained(tmp_path / "backbone")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (tmp_path / "results.jsonl").write_text('{"value": 1}\n{"val')
    (tmp_path / "predictions").mkdir()
    np.save(tmp_path / "predictions" / "knn.npy", np.arange(9))
    return tmp_path


def test_what_is_allowed_breaks_no_promise(run: Path) -> None:
    state = state_of(run)
    assert {promise: state[promise] for promise in PROMISES} == dict.fromkeys(PROMISES)
    assert (state["step"], state["rows"]) == (7, [{"value": 1}])
    assert (state["cut line of results"], state["cut line of metrics"]) == (b'{"val', b"")
    assert state_of(run / "nowhere")["step"] == -1


def cut(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[:-20])


@pytest.mark.parametrize(
    ("promise", "damage"),
    [
        ("checkpoint", cut("checkpoint.pt")),
        ("metrics", lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')),
        ("results", cut("predictions/knn.npy")),
        ("backbone", cut("backbone/model.safetensors")),
    ],
)
def test_damage_breaks_its_promise(promise: str, damage: Callable[[Path], None], run: Path) -> None:
    damage(run)
    state = state_of(run)
    assert state[promise] is not None
    assert [other for other in PROMISES if state[other] is not None] == [promise]


def test_a_lock_that_is_held_breaks_its_promise(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def held(_folder: Path) -> None:
        raise FolderInUse("by process 7")

    monkeypatch.setattr("storage.lock.locked", held)
    assert state_of(run)["lock"] == "by process 7"


def test_the_number_of_kills_is_checked() -> None:
    with pytest.raises(ValueError, match=r"`kills` \(=0\) must be at least 1"):
        faults.faults(kills=0)
