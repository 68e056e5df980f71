"""The DAVIS protocol on small videos in DAVIS's own layout."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from davis_folder import PALETTE, write_davis
from evaluators.dense.video.davis import frame_size, load_davis, read_annotation, read_frame
from evaluators.dense.video.masks import segment
from evaluators.dense.video.segmentation import VideoOptions, video_segmentation
from evaluators.protocol import Evaluation, NotApplicable
from patch_encoder import PatchEncoder

OPTIONS = VideoOptions(side=64, radius=2)
SEQUENCES = {"one": [(1, 2)], "two": [(0, 1), (4, 8)]}


def evaluation(data: Path | None, output: Path, encoder=None) -> Evaluation:
    return Evaluation(encoder or PatchEncoder(8), lambda split: None, "test", data, None, output)


def values(data: Path, output: Path, options: VideoOptions = OPTIONS) -> dict[str, float]:
    return {metric.name: metric.value for metric in video_segmentation(evaluation(data, output), options)}


@pytest.fixture(scope="module")
def davis(tmp_path_factory) -> Path:
    return write_davis(tmp_path_factory.mktemp("davis"), SEQUENCES)


def test_objects_with_features_of_their_own_are_followed(davis, tmp_path):
    metrics = list(video_segmentation(evaluation(davis, tmp_path), OPTIONS))
    names = ["J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay"]
    assert [metric.name for metric in metrics] == names
    got = {metric.name: metric.value for metric in metrics}
    assert got["J-Mean"] > 0.95
    assert got["F-Mean"] > 0.95
    assert got["J-Recall"] == got["F-Recall"] == 1
    assert metrics[0].options["n"] == 3
    assert metrics[0].options["sequences"] == 2
    assert metrics[0].options["split"] == "val"


def test_a_radius_too_small_for_the_motion_loses_the_objects(tmp_path):
    """Two patches per frame cannot be followed within one; with a larger radius they can."""
    data = write_davis(tmp_path / "davis", {"one": [(1, 2)]}, frames=8)
    for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
        for frame in (1, 3, 5, 7):
            (data / kind / "480p" / "one" / f"{frame:05}.{suffix}").unlink()
    slow, fast = (values(data, tmp_path, VideoOptions(side=64, radius=radius))["J-Mean"] for radius in (1, 3))
    assert slow < 0.7 < 0.95 < fast


def test_written_masks_and_table_hold_the_numbers(davis, tmp_path):
    """Recomputed from the files: void and the first and last frame do not count."""
    options = VideoOptions(side=64, radius=1, write_masks=True)
    got = values(davis, tmp_path, options)
    means = {}
    for name, objects in SEQUENCES.items():
        for number in range(1, len(objects) + 1):
            scores = []
            for frame in range(1, 5):
                with Image.open(tmp_path / "davis2017" / name / f"{frame:05}.png") as mask:
                    assert mask.mode == "P"
                    assert mask.getpalette()[: len(PALETTE)] == PALETTE
                    found = np.asarray(mask) == number
                with Image.open(davis / "Annotations" / "480p" / name / f"{frame:05}.png") as truth:
                    wanted = np.asarray(truth) == number
                scores.append((found & wanted).sum() / (found | wanted).sum())
            means[f"{name}_{number}"] = np.mean(scores)
    assert got["J-Mean"] == pytest.approx(np.mean(list(means.values())))
    with (tmp_path / "davis2017-val.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["Sequence"]: float(row["J-Mean"]) for row in rows} == pytest.approx(means, abs=1e-4)
    assert len(list((tmp_path / "davis2017" / "two").iterdir())) == 6


def test_void_is_background_and_portrait_frames_are_upright(tmp_path):
    data = write_davis(tmp_path / "davis", {"tall": [(1, 2)]}, size=(96, 208))
    path = data / "Annotations" / "480p" / "tall" / "00000.png"
    labels = np.array(Image.open(path))
    labels[:4] = 255
    image = Image.fromarray(labels)
    image.putpalette(PALETTE + [0] * (3 * 256 - len(PALETTE)))  # or label 255 could not be written
    image.save(path)
    assert np.unique(read_annotation(path)).tolist() == [0, 1]
    (video,) = load_davis(data)
    masks = segment(PatchEncoder(8), video, side=64)
    assert {mask.shape for mask in masks} == {(208, 96)}
    assert all(mask.max() == 1 for mask in masks)


@pytest.mark.parametrize(
    ("size", "side", "patch_size", "want"),
    [
        ((854, 480), 480, 16, (832, 480)),
        ((854, 480), 480, 8, (832, 480)),
        ((480, 854), 480, 16, (480, 832)),
        ((854, 480), 480, 14, (854 // 14 * 14, 476)),
        ((910, 480), 240, 16, (448, 240)),
    ],
)
def test_frame_sizes(size, side, patch_size, want):
    assert frame_size(size, side, patch_size) == want


def test_a_side_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match=r"`side` \(=30\) leaves nothing of a frame of 854 x 480 px"):
        frame_size((854, 480), 30, 8)


def test_a_frame_of_its_own_size_is_only_normalised(davis):
    path = davis / "JPEGImages" / "480p" / "one" / "00002.jpg"
    with Image.open(path) as image:
        want = (np.asarray(image) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(read_frame(path, 64, 8, (128, 64)), want.transpose(2, 0, 1), atol=1e-5)


def remove(path: str):
    return lambda data: shutil.rmtree(data / path) if (data / path).is_dir() else (data / path).unlink()


def rewrite(path: str, image: Image.Image):
    return lambda data: image.save(data / path)


def truncate(path: str):
    return lambda data: (data / path).write_bytes((data / path).read_bytes()[:-30])


TREE = r"expected DATA/JPEGImages/480p/SEQUENCE/\*\.jpg, DATA/Annotations/480p/SEQUENCE/\*\.png and DATA/ImageSets"
FRAME, ANNOTATION = "JPEGImages/480p/one/00002.jpg", "Annotations/480p/one/00002.png"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (remove("ImageSets"), NotApplicable, rf"`data` \(='.*'\) is not the folder of DAVIS: {TREE}"),
        (remove("ImageSets/2017/val.txt"), FileNotFoundError, rf"has no ImageSets/2017/val\.txt: {TREE}"),
        (lambda data: (data / "ImageSets/2017/val.txt").write_text("\n"), FileNotFoundError, f"no sequence: {TREE}"),
        (
            lambda data: (data / "ImageSets/2017/val.txt").write_text("one\n../480p/two\n"),
            ValueError,
            rf"must name folders of JPEGImages/480p, not '\.\./480p/two': {TREE}",
        ),
        (remove("JPEGImages/480p/two"), FileNotFoundError, f"no frames of the sequence 'two': {TREE}"),
        (remove("Annotations/480p/one"), FileNotFoundError, rf"6 of 6 frames of the sequence 'one' .*: {TREE}"),
        (remove(ANNOTATION), FileNotFoundError, r"1 of 6 frames of the sequence 'one' .*one/00002\.png"),
        (truncate(FRAME), OSError, r"cannot read the image '.*one/00002\.jpg'"),
        (truncate(ANNOTATION), OSError, r"cannot read the image '.*one/00002\.png'"),
        (rewrite(FRAME, Image.new("RGB", (128, 72))), ValueError, r"00002\.jpg' must be 128 x 64 px like its annot"),
        (rewrite(ANNOTATION, Image.new("L", (128, 72))), ValueError, r"00002\.png' must be 128 x 64 px like the first"),
        (rewrite(ANNOTATION, Image.new("RGB", (128, 64))), ValueError, r"00002\.png' has mode RGB, but must be an ind"),
        (
            rewrite("Annotations/480p/one/00000.png", Image.new("L", (128, 64))),
            ValueError,
            r"00000\.png' must show an object",
        ),
        (
            lambda data: [remove(f"JPEGImages/480p/one/0000{frame}.jpg")(data) for frame in range(4)],
            ValueError,
            "'one' must have at least 3 frames",
        ),
    ],
)
def test_what_is_missing_or_damaged_is_named(davis, tmp_path, damage, error, message):
    data = Path(shutil.copytree(davis, tmp_path / "davis"))
    damage(data)
    with pytest.raises(error, match=message):
        values(data, tmp_path)


def test_raw_pixels_and_no_data_are_not_applicable(tmp_path):
    with pytest.raises(NotApplicable, match=rf"`data` \(=None\) is not the folder of DAVIS: {TREE}"):
        list(video_segmentation(evaluation(None, tmp_path), OPTIONS))
    pixels = Evaluation(None, lambda split: None, "test", tmp_path, None, tmp_path)
    with pytest.raises(NotApplicable, match="needs the patch tokens of a vision transformer"):
        list(video_segmentation(pixels, OPTIONS))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"topk": 0}, r"`topk` \(=0\) must be at least 1"),
        ({"temperature": 0.0}, r"`temperature` \(=0\.0\) must be pos"),
    ],
)
def test_options_out_of_range(option, message):
    with pytest.raises(ValueError, match=message):
        VideoOptions(**option)
