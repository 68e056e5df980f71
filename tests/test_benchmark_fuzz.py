"""`python -m benchmarks fuzz` in small: nothing goes wrong, and the judge would see it if it did."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("datasets")

from benchmarks.fuzz import command
from benchmarks.fuzz.hostile import HOSTILE
from benchmarks.fuzz.verdict import CRASH, FORBIDDEN, HANG, READ, SILENT, TOLD, UNCLEAR, WRONG, fingerprint, judge
from benchmarks.fuzz.watch import Watch


@pytest.mark.slow
def test_every_hostile_file_and_some_damaged_ones_are_read_or_told(tmp_path: Path) -> None:
    found = command.fuzzed(tmp_path, seed=1, inputs=10)
    wrong = [(name, what, verdict) for name, all_of in found.items() for what, verdict in all_of]
    assert [case for case in wrong if case[2].kind in WRONG] == []
    assert {name: len(all_of) - len(HOSTILE.get(name, ())) for name, all_of in found.items()} == {
        loader.name: max(1, round(10 * loader.share)) for loader in command.LOADERS
    }
    assert {verdict.kind for _, _, verdict in wrong} == {READ, TOLD}


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Watch:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "outside").mkdir()
    (folder / "outside" / "secret").touch()
    return Watch(folder, folder / "outside")  # its hook stays, and does nothing outside `watching`


def fail(error: Exception) -> Any:
    raise error


def spin() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (lambda folder: 7, READ),
        (lambda folder: 8, SILENT),
        (lambda folder: fail(ValueError("file.pt is damaged")), TOLD),
        (lambda folder: fail(ValueError("it is damaged")), UNCLEAR),
        (lambda folder: fail(KeyError("file.pt")), CRASH),
        (lambda folder: spin(), HANG),
        (lambda folder: os.system("true"), FORBIDDEN),
        (lambda folder: (folder / "executed").mkdir(), FORBIDDEN),
        (lambda folder: (folder / "outside" / "secret").read_text(), FORBIDDEN),
        (lambda folder: (folder.parent / "left").write_text("x"), FORBIDDEN),
        (lambda folder: (folder / "inside").write_text("x") and 7, READ),
    ],
)
def test_the_judge_sees_what_goes_wrong(
    read: Callable[[Path], Any], kind: str, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.fuzz.verdict.SECONDS", 1)
    folder = Path(watch.inside)
    expected = fingerprint(7)
    mark = folder / "executed"
    found = judge(lambda: read(folder), watch, names=["file.pt"], expected=expected, mark=mark)
    assert found.kind == kind, found
    assert not mark.exists()


def test_other_content_has_another_fingerprint() -> None:
    one = {"a": torch.zeros(2), "b": [1, (2, 3)]}
    others = [{"a": torch.zeros(2), "b": [1, (2, 4)]}, {"a": torch.ones(2), "b": [1, (2, 3)]}, {"a": torch.zeros(2)}]
    assert len({fingerprint(value) for value in (one, *others)}) == 4
    assert fingerprint({"a": torch.zeros(2), "b": [1, (2, 3)]}) == fingerprint(one)


def test_the_number_of_inputs_is_checked() -> None:
    with pytest.raises(ValueError, match=r"`inputs` \(=0\) must be at least 1"):
        command.fuzz(inputs=0)
