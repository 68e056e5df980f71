"""`python -m benchmarks matrix`: what works where, by running the tests that show it."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks import results
from benchmarks.marked_tables import filled

ROOT = Path(__file__).parents[1]
README, MIGRATING = ROOT / "README.md", ROOT / "docs" / "migrating.md"
UPSTREAM = "tests/upstream/test_"
FUSED = "tests/test_compat_fused.py::test_fused_is_unfused"
FSDP2 = "tests/test_compat_fsdp2.py::test_two_ranks_train_as_one_process"


@dataclass(frozen=True)
class CodeBase:
    """A row of the matrix; the tests are beginnings of pytest's node ids, and all that begin so must pass.

    `diffs` counts the diffs of the section from 0; each stands with what it is for, where it is not for all.
    """

    section: str
    diffs: tuple[tuple[int, str], ...]
    original: tuple[str, ...]
    fused: tuple[str, ...]
    fsdp2: tuple[str, ...]
    how: str
    part: str = ""
    experimental: bool = False

    @property
    def name(self) -> str:
        """The code base, and which part of it, where it has several rows."""
        return self.section + (f", {self.part}" if self.part else "")


CODE_BASES = (
    CodeBase(
        "facebookresearch/dino",
        ((0, ""),),
        (f"{UPSTREAM}dino.py",),
        (f"{UPSTREAM}dino.py::test_loss_and_gradients_are_those_of_the_equations[True]",),
        (f"{FSDP2}[dino-",),
        "its own training script",
    ),
    CodeBase(
        "bytedance/ibot",
        ((0, ""), (1, "for `fused`")),
        (f"{UPSTREAM}ibot.py",),
        (f"{UPSTREAM}ibot.py::test_loss_and_gradients_are_those_of_the_equations[default-True]",),
        ("tests/test_compat_ibot_ranks.py::test_two_ranks_equal_one_process[default, fused, sharded]",),
        "its own training script; FSDP2 with `fused`",
    ),
    CodeBase(
        "vturrisi/solo-learn",
        ((0, ""),),
        (f"{UPSTREAM}solo.py",),
        (f"{UPSTREAM}solo.py::test_loss_and_gradients_are_those_of_the_equations[True]",),
        (f"{FSDP2}[solo-",),
        "its own module and hooks, without Lightning",
        part="DINO",
    ),
    CodeBase(
        "galilai-group/stable-pretraining",
        ((0, ""),),
        (
            f"{UPSTREAM}stable_pretraining.py::test_at_norm_one_with_logit_centring_training_is_the_original_one[DINO-",
            f"{UPSTREAM}stable_pretraining.py::test_loss_and_gradients_are_those_of_the_equations[DINO-",
            f"{UPSTREAM}stable_pretraining.py::test_save_and_restore[DINO]",
            f"{UPSTREAM}stable_pretraining.py::test_wrong_use_raises[DINO-",
        ),
        (f"{UPSTREAM}stable_pretraining.py::test_loss_and_gradients_are_those_of_the_equations[DINO-True]",),
        (f"{FSDP2}[stable_pretraining-",),
        "its own method, without Lightning, with a small backbone",
        part="DINO",
    ),
    CodeBase(
        "galilai-group/stable-pretraining",
        ((1, ""),),
        (
            f"{UPSTREAM}stable_pretraining.py::test_at_norm_one_with_logit_centring_training_is_the_original_one[iBOT-",
            f"{UPSTREAM}stable_pretraining.py::test_loss_and_gradients_are_those_of_the_equations[iBOT-",
            f"{UPSTREAM}stable_pretraining.py::test_save_and_restore[iBOT]",
            f"{UPSTREAM}stable_pretraining.py::test_wrong_use_raises[iBOT-",
        ),
        (f"{UPSTREAM}stable_pretraining.py::test_loss_and_gradients_are_those_of_the_equations[iBOT-True]",),
        (),
        "its own method, without Lightning, with a small backbone",
        part="iBOT",
    ),
    CodeBase(
        "lightly-ai/lightly",
        ((0, ""),),
        (
            f"{UPSTREAM}lightly.py::test_at_norm_one_with_logit_centring_training_is_the_original_one",
            f"{UPSTREAM}lightly.py::test_loss_and_gradients_are_those_of_the_equations",
            f"{UPSTREAM}lightly.py::test_save_and_restore",
            f"{UPSTREAM}lightly.py::test_wrong_use_raises",
        ),
        (f"{FUSED}[probability-lightly_views", f"{FUSED}[logit-lightly_views"),
        (f"{FSDP2}[lightly-",),
        "its own example script; `fused` in our tests",
        part="DINO",
    ),
    CodeBase(
        "lightly-ai/lightly",
        ((1, ""),),
        (
            f"{UPSTREAM}lightly.py::test_dinov2_at_norm_one_with_logit_centring_is_the_original_one",
            f"{UPSTREAM}lightly.py::test_dinov2_loss_and_gradients_are_those_of_the_equations",
            f"{UPSTREAM}lightly.py::test_dinov2_save_and_restore",
            f"{UPSTREAM}lightly.py::test_dinov2_wrong_use_raises",
        ),
        (f"{FUSED}[probability-lightly_", f"{FUSED}[logit-lightly_"),
        (f"{FSDP2}[lightly, patches-",),
        "its own example script; `fused` in our tests",
        part="DINOv2",
    ),
    CodeBase(
        "microsoft/esvit",
        ((0, ""),),
        (f"{UPSTREAM}esvit.py",),
        (
            f"{UPSTREAM}esvit.py::test_loss_and_gradients_of_regions_are_those_of_the_equations[True]",
            f"{UPSTREAM}esvit.py::test_loss_and_gradients_of_mixtures_are_those_of_the_equations[True]",
        ),
        (f"{FSDP2}[esvit-",),
        "its own training script, with regions and with mixtures",
        experimental=True,
    ),
    CodeBase(
        "galilai-group/stable-pretraining",
        ((2, ""),),
        (
            f"{UPSTREAM}stable_pretraining.py::test_at_norm_one_with_logit_centring_training_is_the_original_one[DINOv2-",
            f"{UPSTREAM}stable_pretraining.py::test_loss_and_gradients_are_those_of_the_equations[DINOv2-",
            f"{UPSTREAM}stable_pretraining.py::test_save_and_restore[DINOv2]",
            f"{UPSTREAM}stable_pretraining.py::test_wrong_use_raises[DINOv2-",
        ),
        (f"{UPSTREAM}stable_pretraining.py::test_loss_and_gradients_are_those_of_the_equations[DINOv2-True]",),
        (),
        "its own method, without Lightning, with a small backbone",
        part="DINOv2",
        experimental=True,
    ),
    CodeBase(
        "facebookresearch/msn",
        ((0, ""),),
        (f"{UPSTREAM}msn.py",),
        (),
        (),
        "its own training script",
        experimental=True,
    ),
    CodeBase(
        "facebookresearch/dinov2",
        ((0, ""),),
        (f"{UPSTREAM}dinov2.py",),
        (f"{FUSED}[probability-dinov2_", f"{FUSED}[logit-dinov2_"),
        (f"{FSDP2}[dinov2-",),
        "its model and training step, with a small backbone and without FSDP; `fused` in our tests, without FSDP2",
        experimental=True,
    ),
    CodeBase(
        "facebookresearch/dinov3",
        ((0, ""),),
        (f"{UPSTREAM}dinov3.py",),
        (),
        ("tests/test_compat_dinov3.py::test_sharded_heads_train_as_whole_ones",),
        "the heads under its losses and parameter groups, not its whole model",
        experimental=True,
    ),
)
COLUMNS = ("original", "fused", "fsdp2")


def matrix(checkouts: Path | None = None) -> None:
    """Run the tests behind the compatibility matrix, keep their outcomes, and make the table of the README anew.

    Args:
        checkouts: folder with clones of the original repositories, as for VMF_HEADS_UPSTREAM. Without it no test is
            run, and the table is made from the newest result file.
    """
    if checkouts is not None:
        files = sorted({test.split("::")[0] for base in CODE_BASES for test in tests(base)})
        check_names(files)
        outcomes = run(files, checkouts)
        rows = [row(base, outcomes, checkouts) for base in CODE_BASES]
        print(results.write("matrix", "cpu", rows))
    README.write_text(rendered(README.read_text()))


def tests(base: CodeBase) -> list[str]:
    """The beginnings of all node ids in a row."""
    return [test for column in COLUMNS for test in getattr(base, column)]


def check_names(files: Sequence[str]) -> None:
    """Raise ValueError where no test of `files` begins as a row says, before the tests take their minutes."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *files]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for base in CODE_BASES:
        for begin in tests(base):
            if not any(test.startswith(begin) for test in found):
                raise ValueError(f"no test begins with {begin!r}")


def run(files: Sequence[str], checkouts: Path) -> dict[str, str]:
    """The outcome of every test in `files` by its node id: passed, failed or skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "--numprocesses=3", "--dist=loadfile", *files]
        command += [f"--junitxml={report}", "-o", "junit_family=xunit1"]
        subprocess.run(
            command, cwd=ROOT, env=os.environ | {"VMF_HEADS_UPSTREAM": str(checkouts.resolve())}, check=False
        )
        cases = ElementTree.parse(report).iter("testcase")
        return {f"{case.attrib['file']}::{case.attrib['name']}": outcome(case) for case in cases}


def outcome(case: ElementTree.Element) -> str:
    """What the report says of one test."""
    found = {child.tag for child in case}
    return "failed" if found & {"failure", "error"} else "skipped" if "skipped" in found else "passed"


def row(base: CodeBase, outcomes: dict[str, str], checkouts: Path) -> dict[str, Any]:
    """For every column how many tests passed, of how many; and the commit of the checkout."""
    checkout = checkouts / base.section.split("/")[1]
    log = subprocess.run(
        ["git", "-C", checkout, "log", "-1", "--format=%h"], capture_output=True, text=True, check=True
    )
    counts = {}
    for column in COLUMNS:
        found = [
            outcome for begin in getattr(base, column) for test, outcome in outcomes.items() if test.startswith(begin)
        ]
        counts[column] = [found.count("passed"), len(found)]
    return {"code_base": base.name, "commit": log.stdout.strip(), **counts}


def rendered(page: str) -> str:
    """`page` with the table `matrix` made from the newest result."""
    return filled(page, {"matrix": table(results.latest("matrix"))}.__getitem__)


def table(result: dict[str, Any]) -> str:
    """The matrix, with what it was measured on."""
    found = {row["code_base"]: row for row in result["rows"]}
    lines = [
        "| code base | lines to change | fused loss | FSDP2 | tests in the original | how, all on CPU |",
        "|---|---|---|---|---|---|",
    ]
    for base in CODE_BASES:
        link = f"[{base.section}](docs/migrating.md#{re.sub(r'[^a-z0-9-]', '', base.section.lower())})"
        name = link + (f", {base.part}" if base.part else "") + (", experimental" if base.experimental else "")
        counts = found[base.name]
        cells = [lines_to_change(base), word(*counts["fused"], none="no"), word(*counts["fsdp2"], none="not tried")]
        passed, of = counts["original"]
        lines.append(f"| {' | '.join([name, *cells, f'{passed} of {of} passed', base.how])} |")
    torch = result["versions"]["torch"]
    return "\n".join(
        [*lines, "", f"({result['device']}, torch {torch}, {result['date']}; `python -m benchmarks matrix`.)"]
    )


def word(passed: int, of: int, *, none: str) -> str:
    """A cell: whether it works, by the tests for it; `none` where there are none."""
    return none if of == 0 else "yes" if passed == of else "fails" if passed == 0 else f"{passed} of {of} tests"


def lines_to_change(base: CodeBase) -> str:
    """Hunk by hunk the larger of what a diff in docs/migrating.md removes and adds."""
    text = MIGRATING.read_text().split(f"\n## {base.section}\n")[1].split("\n## ")[0]
    diffs = re.findall(r"^```diff\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    counts = []
    for index, purpose in base.diffs:
        hunks = re.split(r"^@@.*\n", diffs[index], flags=re.MULTILINE)[1:]
        lines = sum(max(len(re.findall(rf"^[{sign}]", hunk, re.MULTILINE)) for sign in "-+") for hunk in hunks)
        counts.append(f"{lines} {purpose}".strip())
    return ", and ".join(counts)
