"""Few-shot evaluation: MSN's objective and features, its lists of images, draws that repeat."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from transformers import ViTConfig, ViTModel

from data.images import Images, load_images
from evaluators.features.encoder import as_encoder
from evaluators.few_shot.few_shot import GAP, FewShotOptions, before_final_norm, fewshot, fit, normalize
from evaluators.few_shot.splits import draw, draw_percent, listed_sets
from evaluators.protocol import Evaluation, Features


def blobs(seed, n=60, classes=3, dim=5):
    centers = np.random.default_rng(99).normal(size=(classes, dim))
    labels = np.arange(n) % classes
    x = centers[labels] + np.random.default_rng(seed).normal(size=(n, dim))
    return Features(x.astype(np.float32), labels.astype(np.int64), [f"class {number}" for number in range(classes)])


SPLITS = {"train": blobs(0), "val": blobs(1, 45), "test": blobs(2, 50)}


def evaluation(splits=SPLITS, **fields):
    fields = {"encoder": None, "split": "test", "data": None, "run": None, "output": Path(), **fields}
    return Evaluation(features=splits.get, **fields)


def msn_objective(weights, x, labels, classes):
    # mean cross-entropy + (0.075 / n) / 2 * |W|^2, without intercept, as MSN's logistic_eval.py hands it to its solver
    log_p = log_softmax(x @ weights.reshape(classes, -1).T, axis=1)
    return -np.mean(log_p[np.arange(len(x)), labels]) + 0.075 / len(x) / 2 * np.sum(weights**2)


def msn_gradient(weights, x, labels, classes):
    p = softmax(x @ weights.reshape(classes, -1).T, axis=1)
    p[np.arange(len(x)), labels] -= 1
    return (p.T @ x / len(x)).ravel() + 0.075 / len(x) * weights


@pytest.mark.parametrize(("classes", "shots"), [(2, 5), (3, 5), (5, 5), (150, 1), (150, 3)])
def test_classifier_minimises_msns_objective(classes, shots):
    train = blobs(0, shots * classes, classes)
    x = normalize(train.x).astype(np.float64)
    problem = (x, train.labels, classes)
    tight = {"gtol": 1e-9, "ftol": 0, "maxiter": 5000}
    best = minimize(msn_objective, np.zeros(5 * classes), problem, "L-BFGS-B", msn_gradient, options=tight)
    classifier = fit(x, train.labels)
    # For two classes scikit-learn has w = W_1 - W_0 alone; the optimum has W_1 = -W_0.
    weights = classifier.coef_ if classes > 2 else np.vstack([-classifier.coef_, classifier.coef_]) / 2
    assert msn_objective(weights.ravel(), *problem) == pytest.approx(best.fun, abs=GAP)
    assert np.allclose(weights, best.x.reshape(classes, -1), atol=0.02)
    assert not classifier.intercept_.any()


def test_mean_and_deviation_are_over_the_sets():
    train, test = SPLITS["train"], SPLITS["test"]
    accuracies = []
    for number in range(4):
        rows = draw(train, 5, number)
        centred = train.x[rows] - train.x[rows].mean(axis=1, keepdims=True)
        unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
        accuracies.append(fit(unit, train.labels[rows]).score(normalize(test.x), test.labels))
    one, five = fewshot(evaluation(), FewShotOptions(shots=(1, 5), draws=4))
    assert (one.name, five.name) == ("1-shot", "5-shot")
    assert five.value == pytest.approx(np.mean(accuracies))
    assert five.options["sd"] == pytest.approx(np.std(accuracies, ddof=1))
    assert five.options["draws"] == 4
    assert 0.4 < one.value < five.value  # chance is 1/3


def test_the_labels_that_are_predicted_are_not_seen():
    shuffled = SPLITS["test"]._replace(labels=np.random.default_rng(0).permutation(SPLITS["test"].labels))
    metrics = list(fewshot(evaluation({**SPLITS, "test": shuffled})))
    assert [metric.name for metric in metrics] == ["1-shot", "2-shot", "5-shot"]
    assert metrics[-1].options["draws"] == 20
    assert abs(metrics[-1].value - 1 / 3) < 0.15


def test_draws_are_balanced_fixed_and_different():
    draws = [draw(SPLITS["train"], 5, number) for number in range(20)]
    for rows in draws:
        assert np.bincount(SPLITS["train"].labels[rows]).tolist() == [5, 5, 5]
        assert len(set(rows)) == 15
    assert len({tuple(sorted(rows)) for rows in draws}) == 20
    assert np.array_equal(draws[7], draw(SPLITS["train"], 5, 7))


def test_percentages_follow_the_classes():
    labels = np.repeat([0, 1, 2], [200, 60, 3])
    train = Features(np.zeros((263, 1), np.float32), labels, ["many", "some", "few"])
    rows = draw_percent(train, 5, 0)
    assert np.bincount(labels[rows]).tolist() == [10, 3, 1]
    assert len(set(rows)) == 14
    assert sorted(draw_percent(train, 100, 0)) == list(range(263))
    (metric,) = fewshot(evaluation(), FewShotOptions(shots=(), percents=(100,), draws=2))
    assert (metric.name, metric.options["sd"]) == ("100percent", 0)  # two draws of everything


def test_features_before_the_final_norm_are_recovered():
    config = ViTConfig(image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    encoder = as_encoder(ViTModel(config, add_pooling_layer=False), "tiny")
    with torch.no_grad():
        encoder.model.layernorm.weight.uniform_(0.2, 3)
        encoder.model.layernorm.bias.normal_()
        images = torch.randn(7, 3, 16, 16)
        tokens = encoder.model(images, output_hidden_states=True).hidden_states[-1]
        after = encoder.cls(images)
    assert torch.allclose(encoder.model.layernorm(tokens)[:, 0], after, atol=1e-5)
    expected = normalize(tokens[:, 0].numpy())
    assert np.allclose(normalize(before_final_norm(encoder, after.numpy())), expected, atol=1e-5)
    assert not np.allclose(normalize(after.numpy()), expected, atol=0.1)

    labels = np.arange(7) % 2
    splits = {"train": Features(after.numpy(), labels, ["a", "b"]), "test": Features(after.numpy(), labels, ["a", "b"])}
    options = FewShotOptions(shots=(3,), draws=1, final_norm=False)
    (metric,) = fewshot(evaluation(splits, encoder=encoder), options)
    rows = draw(splits["train"], 3, 0)
    assert metric.value == fit(expected[rows], labels[rows]).score(expected, labels)


NAMES = [f"n0{label}_{number}.JPEG" for label in (3, 7) for number in range(4)]


@pytest.fixture
def imagenet(tmp_path):
    """Two classes of ImageNet with four train images each; sorted, rows 0 to 3 and 4 to 7."""
    for name in NAMES:
        folder = tmp_path / "data/train" / name.split("_")[0]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name, format="JPEG")
    return tmp_path / "data"


def write_lists(folder, lists):
    for name, rows in lists.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{NAMES[row]}\n" for row in rows))
    return folder


def test_published_lists_are_matched_with_the_images(imagenet, tmp_path):
    lists = {
        "imagenet_subsets1/1imgs_class.txt": [4, 2],
        "imagenet_subsets1/1percent.txt": [5, 0, 1],
        "imagenet_subsets2/1imgs_class.txt": [3, 7],
        "imagenet_subsets3/3imgs_class.txt": [7, 1, 6, 0],  # MSN's holds five images per class, whatever its name says
    }
    splits = write_lists(tmp_path / "msn", lists)
    sets = listed_sets(splits, load_images("folder", "train", data=imagenet))
    assert [chosen.name for chosen in sets] == ["1-shot", "1percent", "1-shot", "2-shot"]
    assert [chosen.rows.tolist() for chosen in sets] == list(lists.values())

    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 4)
    features = Features((rng.normal(size=(8, 5)) + labels[:, None]).astype(np.float32), labels, ["n03", "n07"])
    given = evaluation({"train": features, "test": features}, data=imagenet, dataset="folder")
    metrics = {metric.name: metric for metric in fewshot(given, FewShotOptions(splits=splits))}
    x = normalize(features.x)
    scores = [fit(x[rows], labels[rows]).score(x, labels) for rows in lists.values()]
    assert metrics["1-shot"].value == pytest.approx((scores[0] + scores[2]) / 2)
    assert metrics["1-shot"].options["sd"] == pytest.approx(abs(scores[0] - scores[2]) / 2**0.5)
    assert {name: metric.options["draws"] for name, metric in metrics.items()} == {
        "1-shot": 2,
        "1percent": 1,
        "2-shot": 1,
    }
    assert "sd" not in metrics["1percent"].options


def test_lists_may_name_the_class(tmp_path):
    items = [Path(f"train/{name}/{number}.png") for name in ("cat", "sea lion") for number in range(2)]
    images = Images("folder", "train", ["cat", "sea lion"], np.array([0, 0, 1, 1]), items)
    (tmp_path / "own.txt").write_text("cat/1.png\n\nsea lion/0.png\r\n")
    (chosen,) = listed_sets(tmp_path, images)
    assert (chosen.name, chosen.rows.tolist()) == ("1-shot", [1, 2])
    (tmp_path / "own.txt").write_text("cat/1.png\n0.png\n")
    with pytest.raises(
        ValueError, match=r"own.txt': 1 names are those of several images: 0.png; expected .*CLASS/NAME"
    ):
        listed_sets(tmp_path, images)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "n03_0.JPEG\nn07_9.JPEG\nx\n",
            r"2 names are not in the train split: n07_9.JPEG, x; expected PATH/\*\*/\*.txt",
        ),
        ("n03_0.JPEG\nn07_1.JPEG\nn03_0.JPEG\n", "2 names are of images listed before: n03_0.JPEG, n03_0.JPEG"),
        ("n03_0.JPEG\n", "1 classes have no image: n07"),
        ("", "2 classes have no image: n03, n07"),
    ],
)
def test_lists_that_do_not_fit_the_images(imagenet, tmp_path, text, message):
    (tmp_path / "msn").mkdir()
    (tmp_path / "msn/1imgs_class.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        listed_sets(tmp_path / "msn", load_images("folder", "train", data=imagenet))


def test_lists_need_a_whole_folder_of_images(imagenet, tmp_path):
    images = load_images("folder", "train", data=imagenet)
    for folder in (tmp_path / "nothing", imagenet):
        with pytest.raises(FileNotFoundError, match="holds no lists: expected PATH"):
            listed_sets(folder, images)
    splits = write_lists(tmp_path / "msn", {"1imgs_class.txt": [0, 4]})
    with pytest.raises(ValueError, match=r"needs a folder of images .*'photos' has no names"):
        listed_sets(splits, load_images("photos", "train"))
    with pytest.raises(ValueError, match="needs the folder of images that its lists are about: --data"):
        list(fewshot(evaluation(), FewShotOptions(splits=splits)))
    one_unreadable = {"train": blobs(0, 7), "test": SPLITS["test"]}
    given = evaluation(one_unreadable, data=imagenet, dataset="folder")
    with pytest.raises(ValueError, match="needs all train images, but 1 could not be read"):
        list(fewshot(given, FewShotOptions(splits=splits)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (FewShotOptions(draws=0), r"`draws` \(=0\) must be at least 1"),
        (FewShotOptions(shots=(5, 0)), r"`shots` \(=\(5, 0\)\) must be at least 1"),
        (FewShotOptions(percents=(0,)), r"`percents` \(=\(0,\)\) must be in \(0, 100\]"),
        (FewShotOptions(regularization=0), r"`regularization` \(=0\) must be positive"),
        (FewShotOptions(shots=(21,)), "class 'class 0' has 20 train images, but 21-shot needs at least 21"),
        (FewShotOptions(final_norm=False), r"`final_norm` \(=False\) must be True where no LayerNorm"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        list(fewshot(evaluation(), options))
