"""The revisited Oxford and Paris protocol on small images in the benchmarks' own layout."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import auc, precision_recall_curve
from transformers import ViTConfig, ViTModel

from evaluators.features.encoder import as_encoder
from evaluators.protocol import Evaluation, NotApplicable
from evaluators.retrieval.retrieval import RetrievalOptions, rank_images, retrieval
from landmark_folder import write_landmarks
from patch_encoder import PatchEncoder

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def evaluation(data: Path | None, encoder=None) -> Evaluation:
    return Evaluation(encoder or PatchEncoder(8), lambda split: None, "test", data, None, Path("unused"))


@pytest.fixture(scope="module")
def landmarks(tmp_path_factory):
    data = tmp_path_factory.mktemp("landmarks")
    return data, {name: write_landmarks(data, name, seed=s) for s, name in enumerate(["roxford5k", "rparis6k"])}


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.3,
    )
    return as_encoder(ViTModel(config, add_pooling_layer=False), "random")


@torch.no_grad()
def feature(encoder, path, size, multiscale, box=None):
    with Image.open(path) as image:
        image = image.crop(box) if box else image.copy()
    if max(image.size) > size:
        factor = size / max(image.size)
        image = image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.LANCZOS)
    pixels = (np.asarray(image) / 255 - MEAN) / STD
    image = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32))[None]
    total = 0
    for scale in (1, np.sqrt(1 / 2), 1 / 2) if multiscale else (1,):
        view = F.interpolate(image, scale_factor=scale, mode="bilinear")
        rows, columns = (side // 8 for side in view.shape[2:])
        total = total + encoder.cls(view[:, :, : rows * 8, : columns * 8])[0].double().numpy()
    return total / np.linalg.norm(total)


def maps(encoder, data, name, content, size, multiscale, crop):
    """mAP (medium, hard) by scikit-learn's curve, query by query."""
    files = {file: data / name / "jpg" / f"{file}.jpg" for file in content["imlist"] + content["qimlist"]}
    bank = np.array([feature(encoder, files[file], size, multiscale) for file in content["imlist"]])
    areas = {"medium": [], "hard": []}
    for file, truth in zip(content["qimlist"][:-1], content["gnd"][:-1], strict=True):
        scores = bank @ feature(encoder, files[file], size, multiscale, truth["bbx"] if crop else None)
        for difficulty, extra in (("medium", "easy"), ("hard", None)):
            wanted = np.isin(np.arange(len(bank)), [*truth["hard"], *(truth["easy"] if extra else [])])
            kept = ~np.isin(np.arange(len(bank)), [*truth["junk"], *([] if extra else truth["easy"])])
            precision, recall, _ = precision_recall_curve(wanted[kept], scores[kept])
            areas[difficulty].append(auc(recall, precision))
    return {difficulty: np.mean(values) for difficulty, values in areas.items()}


@pytest.mark.parametrize(("multiscale", "crop"), [(False, False), (True, False), (False, True)])
def test_maps_are_those_of_a_computation_by_hand(landmarks, vit, multiscale, crop):
    data, contents = landmarks
    size = 32 if crop else 64
    options = RetrievalOptions(image_size=size, multiscale=multiscale, crop_queries=crop, num_workers=0)
    metrics = {metric.name: metric for metric in retrieval(evaluation(data, vit), options)}
    for name, content in contents.items():
        want = maps(vit, data, name, content, size, multiscale, crop)
        for difficulty in ("medium", "hard"):
            metric = metrics[f"{name}_{difficulty}_mAP"]
            assert metric.value == pytest.approx(want[difficulty], abs=1e-12)
            assert metric.options["n"] == 2, "the third query has no positives"
        assert want["medium"] != pytest.approx(want["hard"], abs=1e-3)
    assert len(metrics) == 2 * 2 * 4


def test_by_default_the_settings_are_those_of_dinos_commands(landmarks):
    metrics = retrieval(evaluation(landmarks[0]), RetrievalOptions(num_workers=0))
    options = {metric.name: metric.options for metric in metrics}
    oxford, paris = options["roxford5k_hard_mAP"], options["rparis6k_medium_mP@5"]
    assert (oxford["image_size"], oxford["multiscale"], oxford["crop_queries"]) == (224, False, False)
    assert (paris["image_size"], paris["multiscale"], paris["crop_queries"]) == (512, True, False)


def test_a_query_that_is_in_the_database_finds_itself_first(landmarks, tmp_path):
    data = Path(shutil.copytree(landmarks[0], tmp_path / "data"))
    content = landmarks[1]["roxford5k"]
    folder = data / "roxford5k" / "jpg"
    for query, truth in zip(content["qimlist"], content["gnd"], strict=True):
        for number in truth["hard"]:
            shutil.copy(folder / f"{query}.jpg", folder / f"{content['imlist'][number]}.jpg")
    options = RetrievalOptions(datasets=("roxford5k",), num_workers=0)
    values = {metric.name: metric.value for metric in retrieval(evaluation(data), options)}
    assert values["roxford5k_hard_mAP"] == values["roxford5k_hard_mP@1"] == values["roxford5k_hard_mP@10"] == 1
    assert values["roxford5k_medium_mP@1"] == 1 > values["roxford5k_medium_mAP"]


def test_processes_that_read_images_change_nothing(landmarks):
    options = [RetrievalOptions(("roxford5k",), image_size=48, num_workers=number) for number in (0, 2)]
    alone, helped = (list(retrieval(evaluation(landmarks[0]), option)) for option in options)
    assert alone == helped


def test_equal_images_keep_their_order():
    bank = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert rank_images(np.array([[0.0, 1.0], [1.0, 0.0]]), bank).tolist() == [[0, 2, 1], [1, 0, 2]]


def change(**parts):
    def damage(data):
        path = data / "roxford5k" / "gnd_roxford5k.pkl"
        path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()) | parts))

    return damage


TREE = r"expected DATA/roxford5k/gnd_roxford5k\.pkl and DATA/roxford5k/jpg/\*\.jpg"
NOT_A_TRUTH = r"gnd_roxford5k\.pkl' is no ground truth of revisited Oxford or Paris: "
NESTED = [1]  # 2 ** 40 numbers, in a pickle of a few hundred bytes
for _ in range(40):
    NESTED = [NESTED, NESTED]
TRUTH = {"bbx": [0, 0, 9, 9], "easy": [0], "hard": [1], "junk": []}


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda data: shutil.rmtree(data / "rparis6k"), NotApplicable, r"no folder rparis6k: .*--datasets chooses"),
        (
            lambda data: (data / "roxford5k/gnd_roxford5k.pkl").unlink(),
            FileNotFoundError,
            rf"has no roxford5k/gnd.*{TREE}",
        ),
        (lambda data: shutil.rmtree(data / "roxford5k/jpg"), FileNotFoundError, rf"has no roxford5k/jpg: {TREE}"),
        (
            lambda data: [(data / f"roxford5k/jpg/image_00000{i}.jpg").unlink() for i in (4, 7)],
            FileNotFoundError,
            rf"2 of the 17 images of gnd_roxford5k\.pkl are not in '.*', first 'image_000004\.jpg': {TREE}",
        ),
        *(
            (
                change(imlist=[name] * 14),
                ValueError,
                rf"{NOT_A_TRUTH}.*the name of an image must be text without folders",
            )
            for name in ("../jpg/image_000000", "/etc/passwd", "a\0b", 7, NESTED)
        ),
        (change(gnd=[TRUTH | {"easy": NESTED}] * 3), ValueError, rf"{NOT_A_TRUTH}.*a list must hold numbers"),
        (change(gnd=[{}] * 3), ValueError, rf"{NOT_A_TRUTH}KeyError\('bbx'\)"),
        *(
            (
                change(gnd=[TRUTH | {"easy": numbers}] * 3),
                ValueError,
                rf"{NOT_A_TRUTH}.*query_000000\.jpg lists an image",
            )
            for numbers in ([14], [-1], [1.5], [float("nan")], [10**30], ["a"])
        ),
        *(
            (change(gnd=[TRUTH | {"bbx": box}] * 3), ValueError, rf"{NOT_A_TRUTH}.*box of query_000000\.jpg must")
            for box in ([5, 0, 5, 9], [0, 9, 5, 1], [0, 0, float("nan"), 9], [0, 0, 5, float("inf")])
        ),
        (change(gnd=[TRUTH] * 2), ValueError, rf"{NOT_A_TRUTH}.*zip"),
        (change(gnd=[TRUTH | {"bbx": [1, 2]}] * 3), ValueError, rf"{NOT_A_TRUTH}.*not enough values"),
        (change(gnd=[], qimlist=[]), ValueError, rf"{NOT_A_TRUTH}.*no query"),
        (change(gnd=[TRUTH | {"hard": []}] * 3), ValueError, "no query of roxford5k has hard positives"),
        (change(imlist=print), ValueError, "cannot read the pickle .* it asks for builtins.print"),
        (
            lambda data: (data / "roxford5k/jpg/image_000002.jpg").write_bytes(b"\xff\xd8\xff"),
            OSError,
            r"cannot read the image '.*image_000002\.jpg'",
        ),
    ],
)
def test_what_is_missing_or_damaged_is_named(landmarks, tmp_path, damage, error, message):
    data = Path(shutil.copytree(landmarks[0], tmp_path / "data"))
    damage(data)
    with pytest.raises(error, match=message):
        list(retrieval(evaluation(data), RetrievalOptions(image_size=32, num_workers=0)))


def test_a_truncated_image_is_named(landmarks, tmp_path):
    data = Path(shutil.copytree(landmarks[0], tmp_path / "data"))
    path = data / "roxford5k" / "jpg" / "query_000001.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(OSError, match=r"cannot read the image '.*query_000001\.jpg'.*truncated"):
        list(retrieval(evaluation(data), RetrievalOptions(image_size=32, num_workers=0)))


def test_what_it_cannot_be_applied_to(landmarks):
    with pytest.raises(NotApplicable, match=r"`data` \(=None\) must be a folder: expected DATA/\{roxford5k,rparis6k\}"):
        list(retrieval(evaluation(None)))
    with pytest.raises(NotApplicable, match="retrieval needs a backbone"):
        list(retrieval(Evaluation(None, lambda split: None, "test", landmarks[0], None, Path("unused"))))
    with pytest.raises(ValueError, match=r"`image_size` \(=0\) must be at least 1"):
        RetrievalOptions(image_size=0)
    with pytest.raises(ValueError, match=r"an image of .* px has no patch of 8 px"):
        list(retrieval(evaluation(landmarks[0]), RetrievalOptions(image_size=7, num_workers=0)))
