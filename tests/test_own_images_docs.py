"""docs/own_images.md: its commands, in their order and in small, do what it says and leave the files that it names."""

import dataclasses
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image, ImageDraw

import evaluate
import neighbours
import pretrain

PAGE = Path(__file__).parents[1] / "docs" / "own_images.md"
SMALL = ("hidden_size=16", "hidden_dim=16", "bottleneck_dim=8", "out_dim=16", "batch_size=16", "epochs=1")
PREPARATION = ("make install", "source .venv/bin/activate", "python -m benchmarks fashion-folder images")
"""What stands on the page before there are images; `draw_images` is in their place here."""


def draw_images(folder: Path) -> None:
    """Discs, squares and triangles of changing size, place and shade: 16 of each to train on, 8 in each other split."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 8), ("test", 8)):
        for sides in (3, 4, 40):
            (folder / split / f"{sides} sides").mkdir(parents=True)
            for number in range(count):
                image = Image.new("L", (28, 28), int(rng.integers(0, 60)))
                circle = (*rng.integers(12, 17, 2).tolist(), int(rng.integers(6, 11)))
                ImageDraw.Draw(image).regular_polygon(circle, sides, fill=int(rng.integers(120, 256)))
                image.save(folder / split / f"{sides} sides" / f"{number:05}.png")


def blocks() -> list[tuple[str, str]]:
    """The page's commands (language "") and Python ("py"), as (language, text) in their order."""
    text = PAGE.read_text(encoding="utf-8")
    fences = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(fence[1], fence[2]) for fence in fences if fence[1] in ("", "py")]


def run(line: str) -> None:
    """Run one command of the page in this process, with sizes that take milliseconds."""
    script, *arguments = shlex.split(line.removeprefix("python examples/vit_ssl/"))
    if script == "pretrain.py":
        options = tyro.cli(pretrain.Options, args=arguments, config=(tyro.conf.FlagCreatePairsOff,))
        if options.data:
            options = dataclasses.replace(options, overrides=(*SMALL, *options.overrides), num_workers=0)
        pretrain.main(options)
    elif script == "evaluate.py":
        evaluate.main([*arguments, "--extract.num-workers", "0"])
    elif script == "neighbours.py":
        tyro.cli(neighbours.main, args=arguments)
    else:
        raise AssertionError(f"the page has a command that this test does not know: {line}")


def test_the_page_goes_from_a_folder_to_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw_images(tmp_path / "images")
    names: dict[str, object] = {}
    done: list[str] = []
    for language, text in blocks():
        if language == "py":
            exec(compile(text, str(PAGE), "exec"), names)
        for line in text.replace("\\\n", " ").splitlines() if language == "" else ():
            if line not in PREPARATION:
                run(line)
                done.append(line.split()[1])
    assert len(done) >= 6
    assert {Path(script).name for script in done} == {"pretrain.py", "evaluate.py", "neighbours.py"}
    named = re.findall(r"`((?:images|runs)/[^`*{ ]+)`", PAGE.read_text(encoding="utf-8"))
    assert len(set(named)) >= 5
    assert [name for name in named if not Path(name).exists()] == []
