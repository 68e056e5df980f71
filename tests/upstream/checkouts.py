"""Checkouts of the original repositories, copied and changed as docs/migrating.md says."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
VARIABLE = "VMF_HEADS_UPSTREAM"


def copy_of(name: str, folder: Path) -> Path:
    """A copy of checkout `name` in `folder`; skips the test where there is no checkout."""
    upstream = os.environ.get(VARIABLE)
    if not upstream:
        pytest.skip(f"{VARIABLE} does not name a folder with checkouts of the original repositories")
    source = Path(upstream, name)
    if not source.is_dir():
        pytest.skip(f"there is no checkout of {name} in {VARIABLE} (={upstream})")
    return Path(shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns(".git", "*.png", "*.ipynb")))


def documented_hunks(section: str, diffs: slice = slice(1)) -> list[tuple[str, str, str]]:
    """(file, old text, new text) of every hunk of the first diff, or these diffs, in this section of
    docs/migrating.md."""
    text = (ROOT / "docs/migrating.md").read_text()
    of_section = re.search(rf"^## {re.escape(section)}$(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    assert of_section, section
    found = re.findall(r"^```diff\n(.*?)^```$", of_section[1], re.MULTILINE | re.DOTALL)[diffs]
    assert found, section
    hunks = []
    for part in re.split(r"^--- ", "".join(found), flags=re.MULTILINE)[1:]:
        file, _, body = part.partition("\n")
        for hunk in re.split(r"^@@.*\n", body, flags=re.MULTILINE)[1:]:
            lines = hunk.splitlines(keepends=True)
            old, new = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
            hunks.append((file, old, new))
    return hunks


def apply_documented_diff(checkout: Path, section: str, diffs: slice = slice(1), **loss_options: Any) -> None:
    """Apply the first diff of docs/migrating.md's section, or these diffs, each hunk where it fits exactly once.

    `loss_options` become additional keywords of the loss, whose call is what a hunk ending in "Loss(" opens.
    """
    for file, old, new in documented_hunks(section, diffs):
        path = checkout / file
        text = path.read_text()
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {file}"
        if loss_options and re.search(r"Loss\($", new):
            start = text.index(old) + len(old)
            end = re.compile(r"\n +\)").search(text, start).start()
            options = "".join(f"\n        {name}={value!r}," for name, value in loss_options.items())
            text = text[:end].rstrip().rstrip(",") + "," + options + text[end:]
        path.write_text(text.replace(old, new))


@dataclass(frozen=True)
class Mistake:
    """A wrong use of the lines: `pattern` in the changed files becomes `wrong`, which must give `message`."""

    pattern: str
    wrong: str
    message: str

    def make(self, checkout: Path, section: str, diffs: slice) -> None:
        """Make it everywhere in the files that these diffs change, at least once."""
        found = 0
        for file in {file for file, _, _ in documented_hunks(section, diffs)}:
            text, times = re.subn(self.pattern, self.wrong, (checkout / file).read_text(), flags=re.MULTILINE)
            (checkout / file).write_text(text)
            found += times
        assert found, self.pattern


ATTACH = r"^( *)(\S+\.attach)\(([^,()]+), ([^,()]+)(.*)\)$"
NOT_RUN = "the teacher's head did not run between `attach` and the first call of the loss"
MISTAKES = {
    "teacher first": Mistake(ATTACH, r"\1\2(\4, \3\5)", r"must be in this order: `attach\(|with the student first"),
    "copy of the teacher": Mistake(ATTACH, r"\1\2(\3, __import__('copy').deepcopy(\4)\5)", NOT_RUN),
    "no attach": Mistake(ATTACH, r"\1pass", r"call `attach\(student, teacher\)` once before the loss"),
}
EVERY_MISTAKE = pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)


def check_raises(train: Callable[..., Any], mistake: Mistake, *arguments: Any, **settings: Any) -> None:
    """This training, with this mistake in the documented lines, ends with an error that says what is wrong."""
    with pytest.raises(AssertionError, match=mistake.message):
        train(*arguments, mistake=mistake, **settings)


class Training:
    """Runs the training script of one repository, every time in a fresh copy of the checkout."""

    def __init__(self, name: str, section: str, script: str, tmp_path_factory: pytest.TempPathFactory) -> None:
        self.name, self.section, self.script, self.factory = name, section, script, tmp_path_factory

    def __call__(
        self,
        options: list[str],
        *,
        diff: bool = True,
        diffs: slice = slice(1),
        loss: dict[str, Any] | None = None,
        also: tuple[str, slice] | None = None,
        mistake: Mistake | None = None,
        folder: Path | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        """What the script recorded with these command-line options.

        `diff` applies the documented diff, or those of the section that `diffs` selects, with `loss` as additional
        arguments of the loss; then `also`, diffs of another section, and `mistake`. `folder` holds checkpoints and
        result, by default a new one; `settings` are the recorder's.
        """
        checkout = copy_of(self.name, self.factory.mktemp(self.name))
        if diff:
            apply_documented_diff(checkout, self.section, diffs, **(loss or {}))
        if also:
            apply_documented_diff(checkout, *also)
        if mistake:
            mistake.make(checkout, self.section, diffs)
        output = (folder or self.factory.mktemp("run")) / "result.pt"
        script = Path(__file__).with_name(self.script)
        arguments = json.dumps({"options": options, **settings}, default=str)
        # lightly's DINOv2 calls the `forward` of its heads, which no hook sees, and is warned without a mistake, too.
        warnings = ["-W", "ignore", *(["-W", f"error:{NOT_RUN}"] if mistake else [])]
        command = [sys.executable, *warnings, str(script), str(checkout), str(output), arguments]
        path = os.pathsep.join(str(p) for p in (ROOT / "src", ROOT / "tests"))
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        finished = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
        return torch.load(output, weights_only=False) | {"file": output, "printed": finished.stdout}


TOLERANCE = 1e-5


def check_same_training(got: dict[str, Any], want: dict[str, Any]) -> None:
    """Two runs agree in optimiser groups, losses, weights and centres."""
    assert got["groups"] == want["groups"]
    assert len(want["losses"]) == 4
    assert not torch.equal(want["losses"][0], want["losses"][3])
    for part in ("losses", "student", "teacher", "state_of_loss"):
        torch.testing.assert_close(got[part], want[part], rtol=1e-4, atol=1e-6, msg=lambda m, part=part: f"{part}: {m}")


def check_goes_on(train: Callable[..., dict[str, Any]], file: Path, *, at: int, **settings: Any) -> None:
    """A run that stops before epoch or step `at`, and another from its checkpoint, are a whole run, bit for bit.

    `train` takes the settings of `interruption`.
    """
    whole, first = train(**settings), train(stop_at=at, **settings)
    torch.save(first["checkpoint"], file)
    second = train(first=at, resume=str(file), **settings)
    assert 0 < len(first["losses"]) < len(whole["losses"])
    assert torch.equal(torch.stack(first["losses"] + second["losses"]), torch.stack(whole["losses"]))
    for part in {"student", "teacher", "state_of_loss"} & whole.keys():
        torch.testing.assert_close(second[part], whole[part], rtol=0, atol=0)


WEIGHT_NORM, LINEAR = ("weight_g", "weight_v"), ("last_layer.weight",)


def check_equations(result: dict[str, Any], centers: list[str], *, prototypes: tuple[str, ...] = WEIGHT_NORM) -> None:
    """Loss, gradients and centres of every step are those of the float64 reference."""
    assert len(result["errors"]) == 4
    for errors in result["errors"]:
        assert set(errors) == {"loss", *prototypes, "backbone and mlp"}
        assert max(errors.values()) < TOLERANCE, errors
    assert list(result["state_of_loss"]) == centers
    for name, want in zip(centers, result["reference_centers"], strict=True):
        torch.testing.assert_close(result["state_of_loss"][name].double(), want, rtol=1e-4, atol=1e-5)


def check_power(result: dict[str, Any]) -> None:
    """The check of the equations would not pass if the teacher's temperature had been left at the student's."""
    for errors in result["errors_at_wrong_temperature"]:
        assert min(errors.values()) > 100 * TOLERANCE, errors
