"""A small folder in the layout of revisited Oxford and Paris."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZES = [(60, 40), (40, 56), (64, 64), (100, 30), (33, 47), (48, 48), (90, 60), (30, 44)]


def write_landmarks(data: Path, name: str, *, images: int = 14, queries: int = 3, seed: int = 0) -> dict[str, Any]:
    """Write images of several sizes and a ground truth; returns what its pickle holds.

    The last query has no easy and no hard image.
    """
    rng = np.random.default_rng(seed)
    folder = data / name / "jpg"
    folder.mkdir(parents=True)
    content: dict[str, Any] = {"imlist": [f"image_{i:06}" for i in range(images)], "gnd": []}
    content["qimlist"] = [f"query_{i:06}" for i in range(queries)]
    for index, file in enumerate([*content["imlist"], *content["qimlist"]]):
        width, height = SIZES[index % len(SIZES)]
        coarse = rng.integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(folder / f"{file}.jpg", quality=95)
    for index in range(queries):
        order = rng.permutation(images)
        easy, hard, junk = (order[:2], order[2:5], order[5:8]) if index < queries - 1 else ([], [], order[:2])
        content["gnd"].append({"bbx": [4.2, 3.0, 28.9, 27.5], "easy": easy, "hard": hard, "junk": junk})
    (data / name / f"gnd_{name}.pkl").write_bytes(pickle.dumps(content, protocol=2))
    return content
