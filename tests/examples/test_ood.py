"""Scores of being out of distribution: each against an independent computation, and what the protocol makes of them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.covariance import EmpiricalCovariance
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from torch.nn import functional as F

from evaluators.knn import predict
from evaluators.ood.baselines import mahalanobis, neighbour_distance, probe_confidence
from evaluators.ood.density import fit_mixture, own_mixture, own_scores
from evaluators.ood.measures import rank_correlation, separation
from evaluators.ood.ood import OodOptions, ood
from evaluators.ood.out_sets import OutSet, parse_out_sets
from evaluators.ood.scores import fit_scores, held_out_rows
from evaluators.protocol import Evaluation, Features, NotApplicable
from evaluators.prototypes.components import Components
from feature_blobs import blobs
from vmf_heads import VMFPrototypeHead
from vmf_heads.mixture import VMFMixture

TRAIN, TEST = blobs(0), blobs(2, 50)
OTHER, FURTHER = blobs(3, 40).x + 2, blobs(4, 30).x - 20


def by_openood(inside, outside):
    """OpenOOD's `auc_and_fpr_recall`, with every threshold: its labels are 1 for what is out, its scores negated."""
    labels, scores = np.repeat([0, 1], [len(inside), len(outside)]), np.concatenate([inside, outside])
    fpr, tpr, _ = roc_curve(labels, -scores, drop_intermediate=False)
    return roc_auc_score(labels, -scores), fpr[np.argmax(tpr >= 0.95)]


@pytest.mark.parametrize("sizes", [(1, 1), (7, 20), (50, 19), (200, 301)])
def test_both_measures_are_openoods_with_and_without_ties(sizes):
    rng = np.random.default_rng(0)
    for values in (rng.normal(size=sum(sizes)), rng.integers(0, 6, sum(sizes)).astype(float)):
        inside, outside = values[: sizes[0]] + 1, values[sizes[0] :]
        found = separation(inside, outside)
        assert found == pytest.approx(by_openood(inside, outside))
        pairs = [(a > b) + (a == b) / 2 for a in inside for b in outside]
        assert found.auroc == pytest.approx(np.mean(pairs))


def test_what_is_out_of_distribution_is_the_positive_class():
    """Two of 40 outsiders score high: they count for nothing where 95 % must be found; two of 40 insiders score low."""
    high = separation(np.arange(40.0), np.r_[np.full(38, -1.0), 50, 60])
    assert (high.fpr95, high.auroc) == (0.0, pytest.approx(0.95))
    low = separation(np.r_[np.full(2, -5.0), np.arange(38.0)], np.full(40, -1.0))
    assert (low.fpr95, low.auroc) == (pytest.approx(0.05), pytest.approx(0.95))
    assert separation(np.ones(9), np.ones(5)) == (0.5, 1.0), "a constant tells nothing"


@pytest.mark.parametrize(("inside", "outside"), [([], [1.0]), ([1.0], []), ([1.0, np.nan], [1.0]), ([1.0], [-np.inf])])
def test_scores_that_cannot_be_compared(inside, outside):
    with pytest.raises(ValueError, match=r"side` \(\d scores\) must hold at least one score, and finite ones alone"):
        separation(np.array(inside), np.array(outside))


def test_the_rank_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    correct = rng.random(80) < 0.6
    for scores in (rng.normal(size=80) + correct, rng.integers(0, 4, 80)):
        assert rank_correlation(scores, correct) == pytest.approx(spearmanr(scores, correct).statistic)
    assert rank_correlation(np.ones(80), correct) is None
    assert rank_correlation(scores, np.ones(80, bool)) is None


@pytest.mark.parametrize("k", [1, 7, 60])
def test_the_distance_to_a_neighbour_by_loops(k):
    def unit(x):
        return x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True)

    expected = [-np.sort(np.linalg.norm(unit(TRAIN.x) - y, axis=1))[k - 1] for y in unit(TEST.x)]
    np.testing.assert_allclose(neighbour_distance(TRAIN.x, k)(TEST.x), expected, atol=2e-4)


@pytest.mark.parametrize("classes", [1, 3])
def test_mahalanobis_distances_are_those_of_scikit_learn(classes, monkeypatch):
    monkeypatch.setattr("evaluators.ood.baselines.ROWS", 7)
    train = TRAIN._replace(labels=TRAIN.labels % classes)
    means = [train.x[train.labels == label].mean(axis=0) for label in range(classes)]
    tied = EmpiricalCovariance(assume_centered=True).fit(train.x - np.stack(means)[train.labels])
    expected = -np.min([tied.mahalanobis(OTHER - mean) for mean in means], axis=0)
    np.testing.assert_allclose(mahalanobis(train)(OTHER), expected, rtol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_direction_that_only_rounding_fills_does_not_count(dtype):
    """After a LayerNorm the coordinates have one sum. The distance is that without one of them."""
    x = np.concatenate([TRAIN.x, OTHER])
    layer_norm = (x - x.mean(axis=1, keepdims=True)).astype(dtype)
    train, others = layer_norm[: len(TRAIN.x)], layer_norm[len(TRAIN.x) :]
    found = mahalanobis(TRAIN._replace(x=train))(others)
    np.testing.assert_allclose(found, mahalanobis(TRAIN._replace(x=train[:, 1:]))(others[:, 1:]), rtol=2e-2)


def test_the_probe_is_chosen_on_rows_that_it_was_not_fitted_to():
    drawn, test = blobs(0, 150), blobs(1, 40)
    # Most are of one class, which is what a probe with too much regularisation always answers.
    kept = np.r_[np.flatnonzero(drawn.labels == 0), np.flatnonzero(drawn.labels)[:40]]
    train = Features(drawn.x[kept], drawn.labels[kept], drawn.classes)
    held_out = held_out_rows(train.labels)
    score, notes = probe_confidence(train, held_out)

    def fitted(rows, c):
        x = train.x[rows].astype(np.float64)
        mean, deviation = x.mean(axis=0), x.std(axis=0)
        classifier = LogisticRegression(C=c, tol=1e-8).fit((x - mean) / deviation, train.labels[rows])
        return lambda queries: classifier.predict_proba((queries - mean) / deviation)

    accuracy = {c: np.mean(fitted(~held_out, c)(train.x[held_out]).argmax(1) == train.labels[held_out])
                for c in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)}  # fmt: skip
    assert accuracy[notes["C"]] == max(accuracy.values()) > min(accuracy.values())
    expected = fitted(np.arange(len(train.x)), notes["C"])(test.x).max(axis=1)
    np.testing.assert_allclose(score(test.x), expected, atol=5e-3)


def test_held_out_rows_are_a_fifth_of_every_class():
    for labels in (np.arange(50) % 5, np.sort(np.arange(50) % 5), np.zeros(50, int)):
        mask = held_out_rows(labels)
        assert np.bincount(labels[mask]).tolist() == (np.bincount(labels) // 5).tolist()
        assert np.array_equal(mask, held_out_rows(labels))


@pytest.mark.parametrize("normalizer", ["vmf", "none"])
def test_the_heads_own_mixture_gives_its_softmax(normalizer):
    torch.manual_seed(0)
    head = VMFPrototypeHead(6, 12, nlayers=1, bottleneck_dim=4, normalizer=normalizer, temperature=0.2, output="logits")
    head.requires_grad_(False).last_layer.weight_g.copy_(torch.linspace(0.5, 3, 12)[:, None])
    constant = head.log_normalizer(0.2) if normalizer == "vmf" else torch.zeros(12)
    own = own_mixture(Components(head.last_layer.weight, 0.2, constant, head.features))
    x = torch.randn(20, 6)
    found = own_scores(own, x.numpy())
    y = F.normalize(head.mlp(x), dim=1)
    softmax = (y @ head.last_layer.weight.T / 0.2 + constant).softmax(dim=1)
    np.testing.assert_allclose(found["head_responsibility"], softmax.amax(1), rtol=1e-4)
    kappa = head.last_layer.weight.norm(dim=1) / 0.2
    np.testing.assert_allclose(found["head_kappa"], kappa[softmax.argmax(1)], rtol=1e-4)
    np.testing.assert_allclose(found["head_density"], VMFMixture.from_head(head, 0.2).log_prob(y), atol=1e-3)


def test_held_out_images_choose_the_number_of_components(monkeypatch):
    monkeypatch.setattr("evaluators.ood.density.COUNTS", (1, 2, 4, 8, 999))
    truth = VMFMixture(torch.ones(4), torch.eye(20)[:4], torch.full((4,), 60.0))
    y, labels = truth.sample(300, torch.Generator().manual_seed(0))
    x = 3 * y.numpy()  # only directions count
    mixture, notes = fit_mixture(x, held_out_rows(labels.numpy()))
    assert notes["components"] == 4
    sweep = notes["held_out_by_components"]
    assert sweep["4"] == max(sweep.values())
    assert sweep["4"] > sweep["2"] + 0.1 > sweep["1"] + 0.2
    assert fit_mixture(x, held_out_rows(labels.numpy()), 3)[0].num_components == 3
    assert mixture.kappa.tolist() == pytest.approx([60] * 4, rel=0.15)


@pytest.mark.parametrize(
    ("train", "options", "message"),
    [
        (blobs(0, 9), {}, r"`train` \(9 images\) must hold at least 10 images"),
        (TRAIN, {"k": 0}, r"`k` \(=0\) must be at least 1"),
        (TRAIN, {"num_components": 61}, r"`num_components` \(=61\) must be from 1 to 60, the number of train images"),
    ],
)
def test_what_cannot_be_fitted(train, options, message):
    with pytest.raises(ValueError, match=message):
        fit_scores(train, None, **options)


def evaluation(train=TRAIN, others=()):
    splits = {"train": train, "test": TEST}
    outside = {name: Features(x, np.zeros(len(x), int), ["x"]) for name, x in others}

    def elsewhere(dataset, data):
        return lambda split: outside[data.name]

    return Evaluation(None, splits.__getitem__, "test", None, None, Path(), "photos", elsewhere)


def numbers(train=TRAIN, components=1, **options):
    others = {"other": OTHER, "further": FURTHER}
    found = evaluation(train, others.items())
    return {metric.name: metric for metric in ood(found, OodOptions(components=components, **options))}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in ("other", "further"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)


def test_the_protocol_reports_every_score_of_every_set(folders):
    found = numbers(near=("other",), far=("away=further",), k=3, components=2)
    scores = ["mixture_density", "mixture_kappa", "knn", "mahalanobis", "msp"]
    assert [name for name in found if name.startswith("auroc") and name.endswith("@other")] == [
        f"auroc_{score}@other" for score in scores
    ]
    distance = neighbour_distance(TRAIN.x, 3)
    auroc, fpr95 = by_openood(distance(TEST.x), distance(OTHER))
    metric = found["auroc_knn@other"]
    assert (metric.value, found["fpr95_knn@other"].value) == (pytest.approx(auroc), pytest.approx(fpr95))
    assert metric.options == {"k": 3, "score": "knn", "out": "other", "kind": "near", "n_out": 40}
    assert found["auroc_knn@near"].value == metric.value
    assert found["auroc_mahalanobis@far"].value == found["auroc_mahalanobis@away"].value == 1.0
    assert found["auroc_mixture_density@other"].options["components"] == 2
    right = predict(TRAIN, TEST, (10,))[10] == TEST.labels
    expected = spearmanr(distance(TEST.x), right).statistic
    assert found["difficulty_knn"].value == pytest.approx(expected)
    assert found["difficulty_knn"].options["top1"] == right.mean()


def test_no_setting_depends_on_the_other_sets(folders):
    alone, together = numbers(out=("other",)), numbers(out=("other", "further"))
    assert all(together[name].value == metric.value for name, metric in alone.items())
    both = numbers(far=("other", "further"))
    mean = (together["fpr95_knn@other"].value + together["fpr95_knn@further"].value) / 2
    assert both["fpr95_knn@far"].value == pytest.approx(mean)
    assert not any(name.endswith(("@near", "@far")) for name in together)


def test_without_labels_there_is_no_probe_and_no_difficulty(folders):
    found = numbers(TRAIN._replace(labels=np.zeros(60, int)), out=("other",))
    assert {name.partition("_")[2].partition("@")[0] for name in found} == {
        "mixture_density", "mixture_kappa", "knn", "mahalanobis"
    }  # fmt: skip
    few = numbers(out=("other",), images=20)
    assert few["auroc_knn@other"].options["k"] == 20


def test_sets_are_named(tmp_path):
    (tmp_path / "whole/cat").mkdir(parents=True)
    (tmp_path / "cut/test").mkdir(parents=True)
    whole, cut, _ = found = parse_out_sets(
        {"out": [str(tmp_path / "whole")], "near": [f"mine={tmp_path / 'cut'}"], "far": ["c=hub:some/cifar10"]}
    )
    assert found == [
        OutSet("whole", "out", "folder", tmp_path / "whole"),
        OutSet("mine", "near", "folder", tmp_path / "cut"),
        OutSet("c", "far", "hub", Path("some/cifar10")),
    ]
    assert (whole.split("test"), cut.split("test")) == ("train", "test")
    assert parse_out_sets({"far": ["digits"]}) == [OutSet("digits", "far", "digits", None)]
    for texts, message in [
        (["digits", "digits=photos"], r"`out` \(='digits=photos'\) must have a name of its own, not 'digits'"),
        (["near=digits"], r"must have a name of its own, not 'near'"),
        (["=digits"], r"`out` \(='=digits'\) must be NAME=DATA: photos, digits, DIR or hub:NAME"),
        (["name="], r"`out` \(='name='\) must be NAME=DATA"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_out_sets({"out": texts})
    with pytest.raises(FileNotFoundError, match=r"`near` \(='nowhere'\) must be photos, digits, a folder or hub:NAME"):
        parse_out_sets({"near": ["nowhere"]})


def test_what_the_protocol_needs():
    with pytest.raises(NotApplicable, match="it needs images of another kind: --out, --near or --far with NAME=DATA"):
        next(ood(evaluation()))
    with pytest.raises(ValueError, match=r"`images` \(=9\) must be at least 10"):
        OodOptions(images=9)
    assert math.isclose(OodOptions().temperature, 0.1)
