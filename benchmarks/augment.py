"""`python -m benchmarks augment`: what one core makes of images, from JPEG files to batches of DINO's crops."""

import contextlib
import io
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import default_collate

from benchmarks import results
from benchmarks.marked_tables import filled
from benchmarks.timing import interleaved_medians
from data.augment import MultiCrop
from data.images import PHOTOS, load_photo
from data.views import finished

DOCS = Path(__file__).parents[1] / "docs" / "examples.md"
SIZE = (500, 375)
"""This is a common size of ImageNet's photographs, in px."""

DECODE, CROP, CHANGE = STAGES = ("decode", "crop, resize, flip", "colour, blur, solarise, normalise")
"""Each stage adds one kind of work to the one before; the last is what `augment_on` of a recipe is about."""
PEER, UP_TO_CROP = "DINO's own", "up to " + CROP


def augment(*, peer: str = "/usr/bin/python3", rounds: int = 7) -> None:
    """Time DINO's multi-crop augmentation on one core, stage by stage, beside DINO's own; write a result file and docs.

    Args:
        peer: a Python that imports torchvision, such as Debian's once python3-torchvision is installed; where it does
            not, DINO's own pipeline is left out.
        rounds: in which the stages take turns; medians are reported.
    """
    torch.set_num_threads(1)
    files = encoded_photos()
    calls = stages(files)
    with peer_pipeline(peer, files) as (versions, call):
        if call is not None:
            calls[PEER] = call
        seconds = interleaved_medians(calls, rounds=rounds, seconds=0.5)
    rows = shares({name: value / len(files) for name, value in seconds.items()})
    print(results.write("augment", "cpu", rows, image_size=list(SIZE), images=len(files), peer=versions))
    print(table(results.latest("augment")))
    DOCS.write_text(rendered(DOCS.read_text()))


def encoded_photos() -> list[bytes]:
    """The photographs of the demo as JPEG files of quality 90 and of `SIZE`."""
    files = []
    for name in PHOTOS:
        file = io.BytesIO()
        load_photo(name).resize(SIZE, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def stages(files: list[bytes]) -> dict[str, Callable[[], object]]:
    """For each stage a function that takes all files through it and the stages before: after the first one a batch."""
    transform = MultiCrop()

    def batch() -> dict[str, list[torch.Tensor]]:
        samples = []
        for number, file in enumerate(files):
            crops, changes = transform.crops(decoded(file), random.Random(number))
            samples.append({"crops": crops, "changes": changes})
        return default_collate(samples)

    return {
        DECODE: lambda: [decoded(file) for file in files],
        CROP: batch,
        CHANGE: lambda: finished(batch()),
    }


def decoded(file: bytes) -> Image.Image:
    """One decoding per image: every crop is cut from it."""
    return Image.open(io.BytesIO(file)).convert("RGB")


@contextlib.contextmanager
def peer_pipeline(python: str, files: list[bytes]) -> Iterator[tuple[str | None, Callable[[], object] | None]]:
    """DINO's own pipeline in another Python, as (its versions, a function that takes all files through it).

    Both are None where that Python does not import torchvision.
    """
    script = Path(__file__).with_name("augment_by_torchvision.py")
    missing = f"`peer` (={python!r}) does not import torchvision: {PEER} pipeline is left out"
    if shutil.which(python) is None:
        print(missing, file=sys.stderr)
        yield None, None
        return
    with tempfile.TemporaryDirectory() as folder:
        for number, file in enumerate(files):
            (Path(folder) / f"{number:02}.jpg").write_bytes(file)
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        with subprocess.Popen([python, str(script), folder], **pipes) as process:
            versions = process.stdout.readline().strip()

            def call() -> None:
                process.stdin.write("go\n")
                if process.stdout.readline() != "done\n":
                    raise RuntimeError(f"{PEER} pipeline has ended in {python}")

            if not versions:
                print(missing, file=sys.stderr)
            yield (versions, call) if versions else (None, None)
            process.stdin.close()


def shares(seconds: dict[str, float]) -> list[dict[str, Any]]:
    """From seconds per image up to each stage to what each stage adds; the last rows are whole pipelines."""
    up_to = {name: value for name, value in seconds.items() if name != PEER}
    total = list(up_to.values())[-1]
    rows, before = [], 0.0
    for name, value in up_to.items():
        rows.append(_row(name, value - before) | {"share": round((value - before) / total, 3)})
        before = value
    wholes = {"all": total, UP_TO_CROP: up_to[CROP]}
    wholes |= {PEER: seconds[PEER]} if PEER in seconds else {}
    return rows + [_row(name, value) | {"images_per_second": round(1 / value, 1)} for name, value in wholes.items()]


def _row(name: str, seconds: float) -> dict[str, Any]:
    return {"stage": name, "milliseconds": round(1e3 * seconds, 3)}


def rendered(page: str) -> str:
    """`page` with the table of the newest results between its markers."""
    return filled(page, lambda _: table(results.latest("augment")), group="augment")


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown, and on what they were measured."""
    rows = {row["stage"]: row for row in result["rows"]}
    peer = rows.get(PEER)
    lines = ["| stage | ms per image | share |", "|---|---|---|"]
    for row in rows.values():
        if "share" in row:
            lines.append(f"| {row['stage']} | {row['milliseconds']:.1f} | {row['share']:.0%} |")
    lines += ["", "| pipeline | ms per image | images/s per core | DINO's time over its own |", "|---|---|---|---|"]
    names = {
        "all": "`augment_on: cpu`",
        UP_TO_CROP: "`augment_on: device`, the loader's part",
        PEER: "DINO's own",
    }
    for stage, name in names.items():
        if row := rows.get(stage):
            ratio = f"{peer['milliseconds'] / row['milliseconds']:.2f}" if peer else "–"
            lines.append(f"| {name} | {row['milliseconds']:.1f} | {row['images_per_second']:.0f} | {ratio} |")
    versions = result["versions"]
    where = f"One core of an {result['device']}, torch {versions['torch']}, Pillow {versions['pillow']}"
    where += f"; DINO's own: {result['peer']}" if peer else ""
    return "\n".join([*lines, "", f"({where}; {result['date']}; `python -m benchmarks augment`.)"])
