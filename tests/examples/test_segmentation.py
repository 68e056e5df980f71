"""Segmentation by patch features: every part against a literal formula, and the whole on small images with masks."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score
from transformers import ViTConfig, ViTModel

import evaluate
from evaluators.dense.segmentation import measures, scorers
from evaluators.dense.segmentation.bank import Bank, build_bank
from evaluators.dense.segmentation.folder import VOID, Pairs, load_pairs, read_mask
from evaluators.dense.segmentation.measures import agreement, confusion, upsampled_labels
from evaluators.dense.segmentation.patches import Patches, label_shares, patches_of
from evaluators.dense.segmentation.scorers import fit_heads, neighbour_scores
from evaluators.dense.segmentation.segmentation import SegmentationOptions, segmentation
from evaluators.protocol import Evaluation, NotApplicable
from mask_folder import write_masked
from patch_encoder import PatchEncoder

OPTIONS = SegmentationOptions(k=5, num_workers=0, cs=(1e-4, 1e-1))


def encoder(size: int = 32) -> PatchEncoder:
    made = PatchEncoder(8)
    made.image_size = size
    return made


def evaluation(data: Path | None, split: str = "test", **options) -> Evaluation:
    options = {"encoder": encoder()} | options
    return Evaluation(features=lambda split: None, split=split, data=data, run=None, output=Path(), **options)


def metrics(data: Path, options: SegmentationOptions = OPTIONS, **settings) -> dict[str, tuple[float, dict]]:
    return {
        metric.name: (metric.value, metric.options) for metric in segmentation(evaluation(data, **settings), options)
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_masked(tmp_path_factory.mktemp("masked"))


def bank(n: int = 30, classes: int = 3) -> Bank:
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(classes, 0.3), n)
    shares[shares < 0.1] = 0
    shares /= shares.sum(axis=1, keepdims=True)
    x = shares @ rng.standard_normal((classes, 6)) + 0.5 * rng.standard_normal((n, 6)) + 2
    return Bank(x.astype(np.float32), shares.astype(np.float32), np.arange(classes, dtype=np.uint8))


def test_miou_is_that_of_scikit_learn_over_all_images():
    rng = np.random.default_rng(0)
    truth = rng.choice([0, 1, 2, 7, VOID], (3, 20, 30), p=[0.5, 0.2, 0.1, 0.1, 0.1]).astype(np.uint8)
    predicted = np.where(rng.random(truth.shape) < 0.6, truth, rng.choice([0, 1, 4], truth.shape)).astype(np.uint8)
    found = agreement(sum(confusion(*pair) for pair in zip(truth, predicted, strict=True)))
    counts = truth != VOID
    assert found.miou == pytest.approx(jaccard_score(truth[counts], predicted[counts], average="macro"))
    assert found.pixel_accuracy == pytest.approx(accuracy_score(truth[counts], predicted[counts]))
    for label in range(10):
        both, either = (
            ((truth == label) & (predicted == label) & counts),
            ((truth == label) | (predicted == label)) & counts,
        )
        assert found.iou.get(label) == (pytest.approx(both.sum() / either.sum()) if either.any() else None)
    assert found.iou[4] == 0, "predicted, and true nowhere"


def test_shares_are_counted_pixel_by_pixel():
    rng = np.random.default_rng(0)
    mask = rng.choice([0, 3, VOID], (9, 14)).astype(np.uint8)
    mask[:3, :4] = VOID
    want = np.zeros((12, 255))
    for (y, x), label in np.ndenumerate(mask):
        if label != VOID:
            want[int(y / 9 * 3) * 4 + int(x / 14 * 4), label] += 1
    want /= np.maximum(want.sum(axis=1, keepdims=True), 1)
    np.testing.assert_allclose(label_shares(mask, 3, 4), want, rtol=1e-6)
    assert not want[0].any()


@pytest.mark.parametrize("k", [4, 99])
def test_neighbours_are_those_of_a_loop(k, monkeypatch):
    monkeypatch.setattr(scorers, "ROWS", 5)
    labelled, tokens = bank(), torch.randn(2, 3, 2, 6)
    got = neighbour_scores(tokens, labelled, k=k, temperature=0.1).numpy()
    for place in np.ndindex(2, 3, 2):
        query = tokens[place].double().numpy()
        cosine = [row @ query / np.linalg.norm(row) / np.linalg.norm(query) for row in labelled.x.astype(np.float64)]
        nearest = sorted(range(30), key=lambda row: -cosine[row])[:k]
        weight = np.exp([cosine[row] / 0.1 for row in nearest])
        want = sum(w * labelled.shares[row] for w, row in zip(weight, nearest, strict=True)) / weight.sum()
        np.testing.assert_allclose(got[place], want, atol=1e-5)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_head_minimises_the_cross_entropy_of_the_shares(classes):
    labelled, c = bank(classes=classes), 0.3
    (head,) = fit_heads(labelled, (c,)).values()
    assert head.converged
    x, shares = torch.from_numpy(labelled.x).double(), torch.from_numpy(labelled.shares).double()
    scale = x.std(dim=0, unbiased=False)
    weight = (head.weight * scale).double()  # of standardised features
    # Of two classes scikit-learn punishes the difference of the weights.
    free = [
        weight[1:] - weight[:1] if classes == 2 else weight,
        head.bias.double() + head.weight.double() @ x.mean(dim=0),
    ]

    def objective(weight, bias):
        weight = torch.cat([-weight / 2, weight / 2]) if classes == 2 else weight
        logits = (x - x.mean(dim=0)) / scale @ weight.T + bias
        return c * -(shares * logits.log_softmax(dim=1)).sum()

    def punished(weight, bias):
        return objective(weight, bias) + (weight**2).sum() / 2

    slopes = torch.autograd.functional.jacobian(punished, tuple(free))
    assert all(slope.abs().max() < 2e-3 * c * len(x) for slope in slopes)
    tokens = torch.randn(1, 2, 2, 6)
    torch.testing.assert_close(head(tokens), F.linear(tokens, head.weight, head.bias))


def test_labels_are_the_largest_of_the_enlarged_scores(monkeypatch):
    scores = torch.randn(4, 3, 5)
    want = F.interpolate(scores.permute(2, 0, 1)[None], (13, 10), mode="bilinear").argmax(dim=1)[0]
    monkeypatch.setattr(measures, "VALUES", 2 * 130)  # two classes at a time
    assert torch.equal(upsampled_labels(scores, (13, 10)), want)


def test_the_whole_is_a_loop_over_images(folder):
    """kNN with every patch in the bank: features, neighbours, enlarging and mIoU computed here."""
    found, about = metrics(folder)["knn_mIoU"]
    network, splits = encoder(), {}
    for split in ("train", "test"):
        images = [Image.open(path).convert("RGB") for path in sorted((folder / "images" / split).iterdir())]
        pixels = np.stack([np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)) for image in images]) / 255
        x = torch.from_numpy((pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).permute(0, 3, 1, 2).float()
        splits[split] = (
            network.patches(x),
            [np.asarray(Image.open(path)) for path in sorted((folder / "masks" / split).iterdir())],
        )
    shares = torch.from_numpy(np.concatenate([label_shares(mask, 4, 4) for mask in splits["train"][1]]))
    known = F.normalize(splits["train"][0].flatten(0, 2), dim=1)[shares.sum(dim=1) > 0]
    shares = shares[shares.sum(dim=1) > 0]
    truth, predicted = [], []
    for tokens, mask in zip(*splits["test"], strict=True):
        cosine, nearest = (F.normalize(tokens, dim=-1) @ known.T).topk(5)
        votes = ((cosine / 0.02).softmax(dim=-1)[..., None] * shares[nearest]).sum(dim=2)
        enlarged = F.interpolate(votes.permute(2, 0, 1)[None], mask.shape, mode="bilinear")[0].argmax(dim=0).numpy()
        truth.append(mask[mask != VOID])
        predicted.append(enlarged[mask != VOID])
    assert found == pytest.approx(
        jaccard_score(np.concatenate(truth), np.concatenate(predicted), average="macro"), abs=2e-3
    )
    assert 0.4 < found < 1
    assert (about["n"], about["classes"], about["patches"], about["k"]) == (3, 3, len(known), 5)
    assert set(about["iou"]) == {"0", "1", "2"}


def test_strength_is_chosen_on_val(folder):
    found = metrics(folder)
    about = found["linear_mIoU"][1]
    sweep = about["val_miou_by_C"]
    assert sweep["0.0001"] < sweep["0.1"] - 0.1
    assert about["C"] == 0.1
    assert metrics(folder, split="val")["linear_mIoU"][0] == sweep["0.1"] != found["linear_mIoU"][0]
    alone = SegmentationOptions(k=5, methods=("knn",), num_workers=0)
    assert metrics(folder, alone) == {name: value for name, value in found.items() if name.startswith("knn")}


def test_a_bank_is_bounded_and_drawn_by_its_seed(folder):
    patches = patches_of(evaluation(folder))
    pairs = Pairs(load_pairs(folder, "train"), "train", 32)

    def draw(most: int, seed: int = 0) -> Bank:
        return build_bank(pairs, patches, most=most, seed=seed, num_workers=0)

    whole, part = draw(1000), draw(26)
    assert len(whole.x) == 7 * 16 - 1, "the patch without a label is not in it"
    assert len(part.x) == 7 * 3
    assert {row.tobytes() for row in part.x} < {row.tobytes() for row in whole.x}
    assert np.array_equal(draw(26).x, part.x)
    assert not np.array_equal(draw(26, seed=1).x, part.x)
    assert len(draw(5).x) == 5
    np.testing.assert_allclose(whole.shares.sum(axis=1), 1, atol=1e-3)
    some = whole.some(9, seed=0)
    assert some.x.shape[0] == some.shares.shape[0] == 9


def test_raw_pixels_are_cut_like_the_networks_patches(folder):
    images = torch.randn(2, 3, 16, 24)
    cut = Patches(None, 8, 16)(images)
    assert torch.equal(cut[1, 1, 2], images[1, :, 8:16, 16:24].flatten())
    found = metrics(folder, encoder=None, network=encoder())
    assert found["knn_mIoU"][0] > 0.4


def test_a_pair_that_cannot_be_used_is_left_out_with_a_word(folder, tmp_path, capsys):
    data = Path(shutil.copytree(folder, tmp_path / "data"))
    (data / "images/train/0.png").write_bytes(b"no image")
    Image.new("L", (9, 9)).save(data / "masks/train/1.png")
    Image.open(data / "masks/test/2.png").convert("RGB").save(data / "masks/test/2.png")
    found = metrics(data)
    assert (found["knn_mIoU"][1]["n"], found["knn_mIoU"][1]["patches"]) == (2, 5 * 16)
    said = capsys.readouterr().err
    assert "2 of 7 train images are left out" in said
    assert "1.png': it must be 40 x 36 px like its image" in said
    assert "2.png': it must be grey or indexed (mode L or P), not RGB" in said


def test_ignored_labels_do_not_count(folder):
    mask = read_mask(folder / "masks/train/0.png", ignore=(1,))
    assert set(np.unique(mask)) == {0, 2, VOID}
    found = metrics(folder, SegmentationOptions(methods=("knn",), ignore=(2,), num_workers=0))["knn_mIoU"][1]
    assert set(found["iou"]) == {"0", "1"}


def each_mask(damage):
    return lambda data: [damage(path) for path in (data / "masks/train").iterdir()]


def remove_mask(data: Path) -> None:
    (data / "masks/train/3.png").unlink()


def repeat_name(data: Path) -> None:
    shutil.copy(data / "images/train/3.png", data / "images/train/3.bmp")


TREE = r"expected DATA/images/\{train,val,test\}/NAME\.jpg and DATA/masks/"
ALONE = "the train masks show class 0 alone, but must show at least 2 classes; pixels of the value 255, which is white"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda data: shutil.rmtree(data / "masks"), NotApplicable, rf"`data` \(='.*'\) is no folder of .*: {TREE}"),
        (lambda data: shutil.rmtree(data / "images/val"), FileNotFoundError, f"no images of the split 'val': {TREE}"),
        (remove_mask, FileNotFoundError, r"1 of 7 train images lack a mask \(.*3\.png\)"),
        (repeat_name, ValueError, "1 of 8 train images share their name, and so their mask"),
        (each_mask(lambda path: Image.new("L", (40, 36), 0).save(path)), ValueError, ALONE),
        (each_mask(lambda path: Image.new("L", (40, 36), 255).save(path)), ValueError, "train masks show no class"),
        (each_mask(lambda path: path.write_bytes(b"")), ValueError, "none of the 7 images of the train split can be r"),
    ],
)
def test_what_is_missing_is_named(folder, tmp_path, damage, error, message):
    data = Path(shutil.copytree(folder, tmp_path / "data"))
    damage(data)
    with pytest.raises(error, match=message):
        metrics(data)


def test_a_split_without_labels_is_refused(folder, tmp_path):
    data = Path(shutil.copytree(folder, tmp_path / "data"))
    for path in (data / "masks/test").iterdir():
        Image.new("L", (40, 36), 255).save(path)
    with pytest.raises(ValueError, match="no pixel of the test masks counts"):
        metrics(data)


def test_no_data_and_convolutional_networks_are_not_applicable(folder):
    with pytest.raises(NotApplicable, match=rf"`data` \(=None\) is no folder of images and masks: {TREE}"):
        metrics(None)
    network = encoder()
    network.has_patches = False
    for settings in ({"encoder": network}, {"encoder": None, "network": network}):
        with pytest.raises(NotApplicable, match="needs the patch tokens of a vision transformer"):
            metrics(folder, **settings)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"k": 0}, r"`k` \(=0\) must be at least 1"),
        ({"temperature": 0.0}, r"`temperature` \(=0\.0\) must be at least"),
        ({"cs": (1.0, 0.0)}, r"`cs` \(=\(1\.0, 0\.0\)\) must be positive numbers"),
        ({"methods": ()}, r"`methods` \(=\(\)\) must name at least one"),
        ({"ignore": (256,)}, r"`ignore` \(=\(256,\)\) must be labels in 0 \.\.\. 255"),
    ],
)
def test_options_out_of_range(option, message):
    with pytest.raises(ValueError, match=message):
        SegmentationOptions(**option)


def test_the_command_writes_rows_and_the_page_a_table(folder, tmp_path):
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes), add_pooling_layer=False).save_pretrained(tmp_path / "model")
    for kind in ("images", "masks"):  # links, as the page makes them
        (tmp_path / "linked" / kind).mkdir(parents=True)
        for split in ("train", "val", "test"):
            (tmp_path / "linked" / kind / split).symlink_to(folder / kind / split)
    where = ["--checkpoint", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--data"]
    where += [str(tmp_path / "linked")]
    where += ["--split", "test", "--extract.image-size", "32", "--num-workers", "0", "--cs", "0.1"]
    for features in ("teacher", "pixels"):
        evaluate.main(["segmentation", *where, "--features", features])
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert [(row["features"], row["metric"]) for row in rows[4:]] == [
        ("pixels", f"{method}_{measure}") for method in ("knn", "linear") for measure in ("mIoU", "pixel_accuracy")
    ]
    assert {(row["n"], row["image_size"], row["split"]) for row in rows} == {(3, 32, "test")}
    evaluate.main(["page", str(tmp_path / "out")])
    page = (tmp_path / "out/evaluation.md").read_text()
    section = page.partition("## Segmentation of 3 test images of linked")[2].partition("\n## ")[0]
    numbers = " | ".join(f"{100 * row['value']:.1f}" for row in rows[4:])
    assert f"| raw pixels | {numbers} |" in section
    assert "| this model |" in section
