"""Retrieval gives the numbers of facebookresearch/dino's evaluation: its data set, its scales, its compute_map."""

import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.augment import to_tensor
from evaluators.protocol import Evaluation
from evaluators.retrieval.average_precision import average_precision, positions, precision_at
from evaluators.retrieval.retrieval import KS, RetrievalOptions, retrieval
from landmark_folder import write_landmarks
from patch_encoder import PatchEncoder
from upstream.checkouts import copy_of
from upstream.evaluations import load_file, prepare


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    checkout = copy_of("dino", tmp_path_factory.mktemp("dino"))
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        utils = load_file(checkout / "utils.py", patch)
        load_file(checkout / "eval_knn.py", patch)
        dataset = load_file(checkout / "eval_image_retrieval.py", patch).OxfordParisDataset
        yield types.SimpleNamespace(compute_map=utils.compute_map, multi_scale=utils.multi_scale, dataset=dataset)


def test_average_precision_of_random_lists(dino):
    rng = np.random.default_rng(0)
    rankings, truths = [], []
    for _ in range(200):
        order = rng.permutation(80)
        positives, junk = rng.integers(1, 12), rng.integers(0, 12)
        rankings.append(rng.permutation(80))
        truths.append({"ok": order[:positives], "junk": order[positives : positives + junk]})
    mean, each, precision, _ = dino.compute_map(np.array(rankings).T, truths, list(KS))
    found = [positions(r, truth["ok"], truth["junk"]) for r, truth in zip(rankings, truths, strict=True)]
    np.testing.assert_allclose([average_precision(places) for places in found], each, rtol=1e-12)
    assert np.mean([average_precision(places) for places in found]) == pytest.approx(mean, rel=1e-12)
    for k, want in zip(KS, precision, strict=True):
        assert np.mean([precision_at(places, k) for places in found]) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(("name", "size", "multiscale"), [("roxford5k", 40, False), ("rparis6k", 64, True)])
def test_the_numbers_from_files_to_map(dino, tmp_path: Path, name: str, size: int, multiscale: bool):
    """Its steps one after the other, as its script takes them, around a network that ignores incomplete patches."""
    truth = write_landmarks(tmp_path, name, images=30, queries=6)["gnd"]
    encoder = PatchEncoder(8)
    features = []
    for split in ("train", "query"):
        images = [image[None] for image, _ in dino.dataset(tmp_path, name, split, transform=to_tensor, imsize=size)]
        rows = [dino.multi_scale(image, encoder.cls) if multiscale else encoder.cls(image) for image in images]
        features.append(F.normalize(torch.cat(rows), dim=1))
    rankings = torch.argsort(-features[0] @ features[1].T, dim=0).numpy()
    wanted = {
        "medium": [{"ok": np.concatenate([t["easy"], t["hard"]]), "junk": t["junk"]} for t in truth],
        "hard": [{"ok": t["hard"], "junk": np.concatenate([t["junk"], t["easy"]])} for t in truth],
    }
    evaluation = Evaluation(encoder, lambda split: None, "test", tmp_path, None, tmp_path)
    options = RetrievalOptions(datasets=(name,), image_size=size, multiscale=multiscale, num_workers=0)
    got = {metric.name: metric.value for metric in retrieval(evaluation, options)}
    for difficulty, lists in wanted.items():
        mean, _, precision, _ = dino.compute_map(rankings, lists, list(KS))
        assert got[f"{name}_{difficulty}_mAP"] == pytest.approx(mean, rel=1e-12)
        if difficulty == "hard":
            continue  # its sum over queries is NaN when one has no positives
        for k, want in zip(KS, precision, strict=True):
            assert got[f"{name}_{difficulty}_mP@{k}"] == pytest.approx(want, rel=1e-12)
