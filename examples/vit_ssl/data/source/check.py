"""A look at the images before the first step: how many there are of each class, what they are like, what is wrong."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from config.recipe import Recipe
from config.sizes import sizes_for
from data.files import open_image, to_rgb
from data.images import Images
from data.left_out import some
from data.stream import ImageStream
from data.unreadable import name_of

MOST, SECONDS = 500, 5.0
"""So many images are opened, or as many as so many seconds allow."""


def check_images(images: Images) -> dict[str, Any]:
    """Return what `OUTPUT/data.json` keeps under "found".

    All images count for `classes` (how many images each has) and `names` (see `repeated_names`). `looked_at` of them,
    drawn at random, were opened: for `modes` (how many images have each), `smallest`, `largest` and `short_side` (its
    median in px), and `unreadable`, a list of CLASS/FILE.
    """
    counts = np.bincount(images.labels, minlength=len(images.classes)).tolist()
    modes: Counter[str] = Counter()
    sizes: list[tuple[int, int]] = []
    unreadable, looked_at, began = [], 0, time.monotonic()
    for index in np.random.default_rng(0).permutation(len(images))[:MOST].tolist():
        if looked_at and time.monotonic() - began > SECONDS:
            break
        looked_at += 1
        try:
            mode, size = _look(images.items[index])
        except (OSError, ValueError):
            unreadable.append(name_of(images, index))
        else:
            modes[mode] += 1
            sizes.append(size)
    paths = [item for item in images.items if isinstance(item, Path)] if isinstance(images.items, list) else []
    found: dict[str, Any] = {"images": len(images), "classes": dict(zip(images.classes, counts, strict=True))}
    found |= {"looked_at": looked_at, "modes": dict(modes.most_common()), "unreadable": sorted(unreadable)}
    if sizes:
        smallest, largest = (f(sizes, key=lambda size: size[0] * size[1]) for f in (min, max))
        found |= {"smallest": _text(smallest), "largest": _text(largest), "short_side": int(median(map(min, sizes)))}
    return found | {"names": repeated_names(paths)}


def repeated_names(paths: list[Path]) -> dict[str, int]:
    """Count what may be one image twice.

    `in_several_classes` counts file names that several classes have, `of_equal_content` those of the first 1000 of them
    that have it with the same content, and `but_for_the_type` images of a class that share a name but for its type.
    """
    by_name, by_stem = defaultdict(list), Counter(f"{path.parent}/{path.stem.lower()}" for path in paths)
    for path in paths:
        by_name[path.name].append(path)
    repeated = [same for same in by_name.values() if len(same) > 1]
    found = {
        "in_several_classes": len(repeated),
        "of_equal_content": sum(map(_have_twins, repeated[:1000])),
        "but_for_the_type": sum(count for count in by_stem.values() if count > 1),
    }
    return {name: count for name, count in found.items() if count}


def look_at(images: Images | ImageStream, recipe: Recipe) -> dict[str, Any] | None:
    """Print what there is to know about the images, and return it; of a stream nothing is known, None."""
    if not isinstance(images, Images):
        return None
    found = check_images(images)
    text = "\n  ".join(lines(found, recipe))
    print(text.encode(errors="backslashreplace").decode())  # names of files may be no text
    return found


def lines(found: dict[str, Any], recipe: Recipe) -> list[str]:
    """Return what `check_images` found as a few lines for a person, with advice where the recipe does not fit."""
    counts = {name: count for name, count in found["classes"].items() if count}
    least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    each = f"{counts[least]} ({least}) to {counts[most]} ({most})" if counts[least] < counts[most] else counts[most]
    said = [f"{found['images']} images in {len(counts)} classes, {each} in each"]
    if found["modes"]:
        sizes = " to ".join(dict.fromkeys((found["smallest"], found["largest"])))
        modes = ", ".join(f"{mode} {count}" for mode, count in found["modes"].items())
        said.append(f"{found['looked_at']} of them looked at: {sizes} px; modes: {modes}")
        said += _advice(found["short_side"], recipe)
    if unreadable := found["unreadable"]:
        said.append(f"cannot be read: {len(unreadable)} of those ({some(unreadable)})")
    names = found["names"]
    if count := names.get("of_equal_content"):
        said.append(f"images in several classes, with the same name and content: {count}")
    if count := names.get("but_for_the_type"):
        said.append(f"images that share their name with another one of their class, but for the type: {count}")
    return said


def _look(item: Any) -> tuple[str, tuple[int, int]]:
    if not isinstance(item, Path):
        return item.mode, item.size
    image = open_image(item)
    mode, size = image.mode, image.size
    to_rgb(image)  # raises ValueError where values cannot be scaled
    return mode, size


def _have_twins(paths: list[Path]) -> bool:
    by_size = defaultdict(list)
    for path in paths:
        if path.exists():
            by_size[path.stat().st_size].append(path)
    return any(len({path.read_bytes() for path in same}) < len(same) for same in by_size.values())


def _advice(side: int, recipe: Recipe) -> list[str]:
    if recipe.image_size < 2 * side:
        return []
    sizes = " ".join(f"{name}={size}" for name, size in sizes_for(side).items())
    return [f"`image_size` (={recipe.image_size}) enlarges most of them twice or more: perhaps --set {sizes}"]


def _text(size: tuple[int, int]) -> str:
    return "{} x {}".format(*size)
