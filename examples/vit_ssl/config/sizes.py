"""Sides of crops and patches, which depend on each other: where they do not fit, the error names a choice that does."""

from __future__ import annotations

import math


def check_sizes(image_size: int, local_size: int, patch_size: int) -> None:
    """Raise ValueError, with sizes that work, unless both crops are a whole number of patches; all are positive."""
    for name, size in {"image_size": image_size, "local_size": local_size}.items():
        if size % patch_size:
            others, same = _other_patches(image_size, local_size, patch_size), _same_patches(name, size, patch_size)
            wrong = f"`{name}` (={size}) must be a multiple of `patch_size` (={patch_size})"
            raise ValueError(f"{wrong}: {others}{same}")


def nearest_multiple(size: int, of: int) -> int:
    """Return the multiple of `of`, at least one time, that is nearest to `size`; the smaller of two."""
    return max(1, math.ceil(size / of - 0.5)) * of


def sizes_for(side: int) -> dict[str, int]:
    """Return sizes to begin with for images whose shorter side is that many pixels: about eight patches on a side."""
    patch_size = next((size for size in (4, 8) if side <= 10 * size), 16)
    image_size = min(nearest_multiple(side, patch_size), 14 * patch_size)
    local_size = nearest_multiple(image_size // 2, patch_size)
    return {"image_size": image_size, "patch_size": patch_size, "local_size": local_size}


def _other_patches(image_size: int, local_size: int, patch_size: int) -> str:
    # At least two patches on a side, and patches of more than a pixel.
    fitting = [side for side in range(2, image_size // 2 + 1) if image_size % side == 0]
    nearest = sorted(fitting, key=lambda side: abs(math.log(side / patch_size)))[:3]
    if not nearest:
        return ""
    best = nearest[0]
    sizes = f"image_size={image_size} patch_size={best} local_size={nearest_multiple(local_size, best)}"
    return f"with image_size={image_size}, patch_size may be {_listed(sorted(nearest))}, for example --set {sizes}; "


def _same_patches(name: str, size: int, patch_size: int) -> str:
    around = (size // patch_size * patch_size, -(-size // patch_size) * patch_size)
    return f"with patch_size={patch_size}, {name} may be {_listed([side for side in around if side])}"


def _listed(numbers: list[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last
