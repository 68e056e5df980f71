"""Label propagation against loops in float64, and by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from devices import DEVICES
from evaluators.dense.video.label_propagation import propagate, track, upsample


def propagate_by_loops(target, sources, labels, radius, topk, temperature):
    h, w, _ = target.shape
    out = np.zeros((h, w, labels.shape[-1]))
    for i in range(h):
        for j in range(w):
            near = []
            for n in range(len(sources)):
                for p in range(h):
                    for q in range(w):
                        if not radius or (abs(p - i) <= radius and abs(q - j) <= radius):
                            near.append((float(target[i, j] @ sources[n, p, q]), labels[n, p, q]))
            kth = sorted((cosine for cosine, _ in near), reverse=True)[:topk][-1]
            kept = [(np.exp(cosine / temperature), label) for cosine, label in near if cosine >= kth]
            out[i, j] = sum(weight * label for weight, label in kept) / sum(weight for weight, _ in kept)
    return out


def unit(*shape, seed=0, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("radius", "topk"), [(1, 5), (2, 3), (0, 5), (12, 1), (1, 100)])
def test_propagation_is_that_of_the_loops(device, radius, topk):
    target, sources, labels = unit(5, 7, 4), unit(3, 5, 7, 4, seed=1), torch.rand(3, 5, 7, 2, dtype=torch.float64)
    want = propagate_by_loops(target.numpy(), sources.numpy(), labels.numpy(), radius, topk, 0.2)
    got = propagate(*(x.to(device) for x in (target, sources, labels)), radius=radius, topk=topk, temperature=0.2)
    np.testing.assert_allclose(got.cpu(), want, rtol=1e-10)


def test_sources_as_similar_as_the_last_count_too():
    target, sources = torch.ones(1, 1, 1), torch.ones(4, 1, 1, 1)
    labels = torch.eye(4)[:, None, None]
    assert propagate(target, sources, labels, topk=2).flatten().tolist() == [0.25] * 4


def test_labels_come_from_the_first_frame_and_the_last_ones():
    features, labels = [3 * unit(4, 6, 8, seed=s) for s in range(6)], torch.rand(4, 6, 3, dtype=torch.float64)
    settings = {"radius": 2, "topk": 4, "temperature": 0.1}
    known = [labels]
    for frame, context in enumerate([[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]], start=1):
        sources = torch.stack([F.normalize(features[index], dim=-1) for index in context])
        target = F.normalize(features[frame], dim=-1)
        known.append(propagate(target, sources, torch.stack([known[index] for index in context]), **settings))
    tracked = list(track(features, labels, last_frames=2, **settings))
    torch.testing.assert_close(torch.stack(tracked), torch.stack(known[1:]), rtol=0, atol=1e-12)
    alone = list(track(features, labels, last_frames=0, **settings))
    assert not torch.allclose(alone[-1], tracked[-1])
    torch.testing.assert_close(alone[0], tracked[0])


def test_upsampling_stretches_what_has_faded():
    """An object at a tenth of the background's weight wins where it is strongest."""
    labels = torch.zeros(4, 4, 3)
    labels[..., 0] = 1
    labels[1:3, 1:3] = torch.tensor([0.9, 0.1, 0.0])
    pixels = upsample(labels, (32, 32))
    want = torch.zeros(32, 32, dtype=torch.int64)
    want[8:24, 8:24] = 1
    # Bilinear maps of a square have round corners; everywhere else the edges are exact.
    for corner in (np.s_[8:12, 8:12], np.s_[8:12, 20:24], np.s_[20:24, 8:12], np.s_[20:24, 20:24]):
        assert 0 < pixels[corner].sum() < 16
        pixels[corner] = 1
    assert pixels.equal(want)


def test_upsampling_a_constant_frame_gives_the_background():
    assert upsample(torch.tensor([1.0, 0.0]).expand(3, 5, 2), (24, 40)).eq(0).all()
