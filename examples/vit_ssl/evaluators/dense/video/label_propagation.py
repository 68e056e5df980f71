"""Labels of a first frame carried through a video by the similarity of patch features (Jabri et al., 2020)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def track(
    features: Iterable[Tensor],
    labels: Tensor,
    *,
    last_frames: int = 7,
    radius: int = 12,
    topk: int = 5,
    temperature: float = 0.1,
) -> Iterator[Tensor]:
    """Yield the soft labels (h, w, C) of the second frame and all later ones, whose `features` are (h, w, D) each.

    Those of a frame come from the first frame, whose `labels` (h, w, C) are given, and from the `last_frames` before
    it, with the labels that they got.
    """
    frames = iter(features)
    first = F.normalize(next(frames), dim=-1)
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=last_frames)
    for frame in frames:
        target = F.normalize(frame, dim=-1)
        sources, known = (torch.stack(parts) for parts in zip((first, labels), *recent, strict=True))
        found = propagate(target, sources, known, radius=radius, topk=topk, temperature=temperature)
        recent.append((target, found))
        yield found


def propagate(
    target: Tensor, sources: Tensor, labels: Tensor, *, radius: int = 12, topk: int = 5, temperature: float = 0.1
) -> Tensor:
    """Return soft labels (h, w, C) of the patches `target` (h, w, D) from those (n, h, w, C) of `sources` (n, h, w, D).

    A patch takes the labels of the `topk` sources most similar to it, with weights softmax(cosine / `temperature`),
    out of those at most `radius` rows and columns away (0: everywhere); sources as similar as the last of them count
    too. Features have length 1. One row of patches at a time, so that the cosines are w * n * (2 radius + 1) * w.
    """
    h, w, _ = target.shape
    reach = radius or max(h, w)
    columns = torch.arange(w, device=target.device)
    far = ((columns[:, None] - columns).abs() > reach)[:, None]  # (w of the target, 1, w of the sources)
    sources, labels = (x.transpose(0, 1).contiguous() for x in (sources, labels))  # rows first: near rows are a view
    rows = []
    for row in range(h):
        near = slice(max(0, row - reach), row + reach + 1)
        cosine = target[row] @ sources[near].flatten(0, 2).T
        cosine = cosine.unflatten(1, (-1, w)).masked_fill_(far, -torch.inf).flatten(1)
        last = cosine.topk(min(topk, cosine.shape[1])).values[:, -1:]
        weight = (cosine.masked_fill_(cosine < last, -torch.inf) / temperature).softmax(dim=1)
        rows.append(weight @ labels[near].flatten(0, 2))
    return torch.stack(rows)


def upsample(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the winning label of every pixel, (height, width) = `size` int64, from soft labels (h, w, C) of patches.

    Enlarged bilinearly, then every channel is stretched to [0, 1] over the frame, so that small objects, which fade,
    do not lose to the background; a channel that is constant is 0.
    """
    maps = F.interpolate(labels.permute(2, 0, 1)[None], size=size, mode="bilinear", align_corners=False)[0]
    maps = maps - maps.amin(dim=(1, 2), keepdim=True)
    return (maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)).argmax(dim=0)
