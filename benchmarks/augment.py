"""`python -m benchmarks augment`: what one core makes of images, from the JPEG file to the crops of DINO."""

import io
import random
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from benchmarks import results
from benchmarks.timing import interleaved_medians
from data.augment import MultiCrop
from data.images import PHOTOS, load_photo

SIZE = (500, 375)
"""This is a common size of ImageNet's photographs, in px."""

# Each stage adds one kind of work to the one before, so that differences of times are shares.
OFF: dict[str, Any] = {"color_strength": 0.0, "grayscale_prob": 0.0, "blur_strength": 0.0, "solarize_prob": 0.0}
STAGES: dict[str, dict[str, Any]] = {
    "decode": {},
    "crop, resize, flip, to tensor": OFF,
    "colour jitter, grey": {name: OFF[name] for name in ("blur_strength", "solarize_prob")},
    "blur, solarise": {},
}


def augment(*, local_crops: int = 8, rounds: int = 7) -> None:
    """Time DINO's multi-crop augmentation on one core, stage by stage, and write benchmarks/results/augment_cpu_*.json.

    Args:
        local_crops: crops of 96 px beside the two of 224 px.
        rounds: in which the stages take turns; medians are reported.
    """
    torch.set_num_threads(1)
    contenders = stages(local_crops, encoded_photos())
    seconds = interleaved_medians({name: call for name, (call, _) in contenders.items()}, rounds=rounds, seconds=0.5)
    rows = shares({name: seconds[name] / images for name, (_, images) in contenders.items()})
    print(table(rows))
    print(results.write("augment", "cpu", rows, local_crops=local_crops, image_size=list(SIZE), images=len(PHOTOS)))


def encoded_photos() -> list[bytes]:
    """The photographs of the demo as JPEG files of quality 90 and of `SIZE`."""
    files = []
    for name in PHOTOS:
        file = io.BytesIO()
        load_photo(name).resize(SIZE, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def stages(local_crops: int, files: list[bytes]) -> dict[str, tuple[Callable[[], None], int]]:
    """For each stage a function that takes all files through it and the stages before, and their number."""

    def decode_only() -> None:
        for file in files:
            decoded(file)

    def through(transform: MultiCrop) -> Callable[[], None]:
        def call() -> None:
            for number, file in enumerate(files):
                transform(decoded(file), random.Random(number))

        return call

    calls = {name: through(MultiCrop(num_local=local_crops, **options)) for name, options in STAGES.items()}
    return {name: (call, len(files)) for name, call in (calls | {"decode": decode_only}).items()}


def decoded(file: bytes) -> Image.Image:
    """One decoding per image: every crop is cut from it."""
    return Image.open(io.BytesIO(file)).convert("RGB")


def shares(seconds: dict[str, float]) -> list[dict[str, Any]]:
    """From seconds per image up to each stage to what each stage adds."""
    rows, before = [], 0.0
    total = list(seconds.values())[-1]
    for name, up_to_here in seconds.items():
        added = up_to_here - before
        rows.append({"stage": name, "milliseconds": round(1e3 * added, 3), "share": round(added / total, 3)})
        before = up_to_here
    return [*rows, {"stage": "all", "milliseconds": round(1e3 * total, 3), "images_per_second": round(1 / total, 1)}]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| stage | ms per image | share |", "|---|---|---|"]
    for row in rows[:-1]:
        lines.append(f"| {row['stage']} | {row['milliseconds']:.1f} | {row['share']:.0%} |")
    whole = rows[-1]
    note = f"{whole['images_per_second']:.0f} images/s per core"
    return "\n".join([*lines, f"| all | {whole['milliseconds']:.1f} | {note} |"])
