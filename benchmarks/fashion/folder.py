"""`python -m benchmarks fashion-folder OUTPUT`: Fashion-MNIST as a folder of images, as examples/vit_ssl reads them."""

from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image

from benchmarks.fashion.data import load_arrays
from storage.whole_file import whole_folder

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
"""By their numbers in the files."""


def fashion_folder(
    output: Annotated[Path, tyro.conf.Positional], *, data: Path | None = None, images: int = 10_000
) -> None:
    """Write OUTPUT/{train,val,test}/CLASS/NUMBER.png, for `pretrain.py --data OUTPUT`.

    Args:
        output: a folder that does not exist yet.
        data: folder of the four files of Fashion-MNIST; without it Debian's package or the hub.
        images: so many from the beginning of each split, of which train has 50 000, val and test 10 000.
    """
    if output.exists():
        raise FileExistsError(f"`output` (={str(output)!r}) must be a folder that does not exist yet")
    if images < 1:
        raise ValueError(f"`images` (={images}) must be at least 1")
    with whole_folder(output) as folder:
        for split, (pixels, labels) in load_arrays(data).items():
            for label, name in enumerate(CLASSES):
                (folder / split / name).mkdir(parents=True)
                for number in (labels[:images] == label).nonzero()[0]:
                    Image.fromarray(pixels[number]).save(folder / split / name / f"{number:05}.png")
            print(f"{split}: {min(images, len(labels))} images")
