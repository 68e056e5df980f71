"""`python -m benchmarks photo-cells OUTPUT`: the demo's photographs in cells, as a folder of images."""

from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image

from data.images import PHOTOS, SPLITS, load_photo, split_columns
from storage.whole_file import whole_folder


def photo_cells(output: Annotated[Path, tyro.conf.Positional], *, side: int = 64, stride: int | None = None) -> None:
    """Write OUTPUT/{train,val,test}/PHOTOGRAPH/NUMBER.png, for `pretrain.py --data OUTPUT`.

    The splits are regions of each photograph, with an unused margin of `side` px between them, as in the data set
    "photos" of examples/vit_ssl. With `side=32` the cells are those of that set.

    Args:
        output: a folder that does not exist yet.
        side: of a cell, in px, at most 64.
        stride: distance of neighbouring cells of a region; by default `side`. A smaller one gives more cells, which
            overlap within their region.
    """
    stride = side if stride is None else stride
    if output.exists():
        raise FileExistsError(f"`output` (={str(output)!r}) must be a folder that does not exist yet")
    if not 8 <= side <= 64:
        raise ValueError(f"`side` (={side}) must be in 8 ... 64")
    if not 1 <= stride <= side:
        raise ValueError(f"`stride` (={stride}) must be in 1 ... {side}, `side`")
    with whole_folder(output) as folder:
        for split in SPLITS:
            folders = {name: folder / split / Path(name).stem for name in PHOTOS}
            written = [_write(path, load_photo(name), split, side, stride) for name, path in folders.items()]
            print(f"{split}: {sum(written)} images")


def _write(folder: Path, photo: Image.Image, split: str, side: int, stride: int) -> int:
    folder.mkdir(parents=True)
    columns = split_columns(photo.width // side)[split]
    number = 0
    for y in range(0, photo.height // side * side - side + 1, stride):
        for x in range(columns.start * side, columns.stop * side - side + 1, stride):
            cell = photo.crop((x, y, x + side, y + side))
            if np.ptp(np.asarray(cell.convert("L"))) >= 8:  # a blank one does not show which photograph it is from
                cell.save(folder / f"{number:05}.png")
                number += 1
    return number
