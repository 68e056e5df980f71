"""DINO's own augmentation of images in torchvision, for any Python that imports it: `python FILE FOLDER`.

Prints a line of versions. For every line that it then reads, it makes a batch of the JPEG files of the folder, as
`DataAugmentationDINO` of facebookresearch/dino does, and prints a line. It needs nothing of this repository.
"""

import random
import sys
from pathlib import Path

import PIL
import torch
import torchvision
from PIL import Image, ImageFilter, ImageOps
from torch.utils.data import default_collate
from torchvision import transforms


def blur(image: Image.Image) -> Image.Image:
    """Gaussian blur of a random radius."""
    return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def solarize(image: Image.Image) -> Image.Image:
    """The bright half of all levels, inverted."""
    return ImageOps.solarize(image)


def view(size: int, scale: tuple[float, float], blur_prob: float, solarize_prob: float = 0.0) -> transforms.Compose:
    """The augmentation of one view."""
    steps = [
        transforms.RandomResizedCrop(size, scale=scale, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(p=0.5),
        transforms.RandomApply([transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomApply([transforms.Lambda(blur)], p=blur_prob),
        *([transforms.RandomApply([transforms.Lambda(solarize)], p=solarize_prob)] if solarize_prob else []),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    return transforms.Compose(steps)


def main(folder: Path) -> None:
    """Answer every line on stdin with a batch."""
    torch.set_num_threads(1)
    views = [view(224, (0.4, 1.0), 1.0), view(224, (0.4, 1.0), 0.1, 0.2), *[view(96, (0.05, 0.4), 0.5)] * 8]
    files = sorted(folder.glob("*.jpg"))
    print(f"torchvision {torchvision.__version__}, torch {torch.__version__}, Pillow {PIL.__version__}", flush=True)
    for _ in sys.stdin:
        images = [Image.open(file).convert("RGB") for file in files]
        default_collate([[transform(image) for transform in views] for image in images])
        print("done", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
