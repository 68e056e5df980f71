"""Video segmentation gives the masks of facebookresearch/dino and the numbers of DAVIS's official evaluation."""

import importlib
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from davis_folder import PALETTE, write_davis
from evaluators.dense.video.davis import load_davis
from evaluators.dense.video.masks import segment
from evaluators.dense.video.metrics import boundary_accuracy, region_similarity, summarize
from evaluators.dense.video.segmentation import VideoOptions, video_segmentation
from evaluators.protocol import Evaluation
from patch_encoder import PatchEncoder
from upstream.checkouts import copy_of
from upstream.evaluations import load_file, prepare

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")]
PATCH = 32


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    checkout = copy_of("davis", tmp_path_factory.mktemp("davis"))
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        patch.syspath_prepend(checkout)
        yield importlib.import_module("davis2017.evaluation")
        for name in [name for name in sys.modules if name.split(".")[0] == "davis2017"]:
            patch.delitem(sys.modules, name)


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    checkout = copy_of("dino", tmp_path_factory.mktemp("dino"))
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        load_file(checkout / "utils.py", patch)
        yield load_file(checkout / "eval_video_segmentation.py", patch)


def official_numbers(official, data: Path, results: Path) -> dict[str, float]:
    measured = official.DAVISEvaluation(davis_root=str(data), task="semi-supervised", gt_set="val").evaluate(
        str(results)
    )
    names = {"M": "Mean", "R": "Recall", "D": "Decay"}
    values = {f"{m}-{names[kind]}": np.mean(measured[m][kind]) for m in "JF" for kind in names}
    return values | {"J&F-Mean": (values["J-Mean"] + values["F-Mean"]) / 2}


def test_j_and_f_of_random_masks(official):
    """Smooth blobs, single pixels, nothing and everything, at DAVIS's size and others."""
    rng = np.random.default_rng(0)
    for shape in [(480, 854), (64, 128), (31, 17)]:
        masks = [
            gaussian_filter(rng.normal(size=shape), sigma) > level for sigma, level in [(9, 0), (3, 0.05), (0.5, 1)]
        ]
        masks += [np.zeros(shape, bool), np.ones(shape, bool), np.roll(masks[0], 3, axis=1)]
        for mask in masks:
            for truth in masks:
                assert region_similarity(mask, truth) == pytest.approx(official.db_eval_iou(truth, mask), abs=1e-15)
                f = official.db_eval_boundary(truth, mask)
                assert boundary_accuracy(mask, truth) == pytest.approx(f, abs=1e-12)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 7, 10, 68, 103])
def test_mean_recall_and_decay(official, frames):
    values = np.random.default_rng(frames).random((2, frames))
    got = summarize([values])
    for measure, row in zip("JF", values, strict=True):
        want = official.utils.db_statistics(row)
        assert [got[f"{measure}-{name}"] for name in ("Mean", "Recall", "Decay")] == pytest.approx(want, abs=1e-15)


def test_the_official_evaluation_of_the_written_masks(official, tmp_path):
    sequences = {"one": [(1, 2)], "two": [(0, 1), (4, 8)], "three": [(2, 3), (5, 0), (0, 9)]}
    data = write_davis(tmp_path / "davis", sequences, frames=8)
    evaluation = Evaluation(PatchEncoder(8), lambda split: None, "test", data, None, tmp_path / "output")
    options = VideoOptions(side=64, radius=1, topk=2, write_masks=True)
    got = {metric.name: metric.value for metric in video_segmentation(evaluation, options)}
    want = official_numbers(official, data, tmp_path / "output" / "davis2017")
    assert got == pytest.approx(want, abs=1e-12)
    assert 0.1 < got["J-Mean"] < 0.95


class Network:
    """The network that DINO's script asks for layers."""

    def __init__(self, encoder: PatchEncoder) -> None:
        self.encoder, self.patch_embed = encoder, types.SimpleNamespace(patch_size=encoder.patch_size)

    def get_intermediate_layers(self, images: torch.Tensor, n: int) -> list[torch.Tensor]:
        patches = self.encoder.patches(images).flatten(1, 2)
        return [torch.cat([patches[:, :1], patches], dim=1)]


@pytest.mark.parametrize(("last_frames", "radius", "topk"), [(3, 3, 5), (7, 12, 5), (2, 0, 8)])
def test_masks_are_those_of_dino(dino, tmp_path, monkeypatch, last_frames, radius, topk):
    """Frame by frame through its own function, from files to files."""
    data = write_davis(tmp_path / "davis", {"two": [(0, 1), (4, 8)]}, frames=9, size=(832, 480))
    (video,) = load_davis(data)
    encoder = PatchEncoder(PATCH)
    arguments = {"n_last_frames": last_frames, "size_mask_neighborhood": radius, "topk": topk, "patch_size": PATCH}
    arguments = types.SimpleNamespace(output_dir=str(tmp_path / "dino"), **arguments)
    monkeypatch.setattr(dino, "args", arguments, raising=False)
    # Its standard deviation of red is 0.228, that of every other evaluation 0.229.
    monkeypatch.setattr(dino.color_normalize, "__defaults__", ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    frames = dino.read_frame_list(str(video.frames[0].parent))
    first, labels = dino.read_seg(str(video.annotations[0]), PATCH)
    palette = np.array(PALETTE, np.uint8).reshape(-1, 3)
    folder = str(video.frames[0].parent)
    dino.eval_video_tracking_davis(arguments, Network(encoder), frames, folder, first, labels, palette)
    want = []
    for path in video.annotations:
        with Image.open(tmp_path / "dino" / "two" / path.name) as image:
            want.append(np.asarray(image))
    got, other = (segment(encoder, video, last_frames=last_frames, radius=radius, topk=k) for k in (topk, topk + 1))
    assert np.mean(np.array(got) != np.array(want)) < 1e-6, "of 3.6 million pixels"
    assert np.mean(np.array(other) != np.array(want)) > 1e-5, "the comparison would notice another topk"
