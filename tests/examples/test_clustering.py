"""Clusters and classes: both measures by loops, whose clusters are meant, and what they are fitted to."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluators.protocol import Evaluation, Features, NotApplicable
from evaluators.prototypes import clustering as module
from evaluators.prototypes.clustering import ClusteringOptions, clustering
from evaluators.prototypes.components import Components
from feature_blobs import blobs

SPLITS = {"train": blobs(0, 90, spread=0.1), "test": blobs(2, 50, spread=0.1)}


def nmi_by_loops(labels, clusters):
    n = len(labels)

    def entropy(groups):
        return -sum(count / n * math.log(count / n) for count in (groups.count(one) for one in set(groups)))

    pairs = list(zip(labels, clusters, strict=True))
    both, of_labels, of_clusters = entropy(pairs), entropy(list(labels)), entropy(list(clusters))
    return (of_labels + of_clusters - both) / ((of_labels + of_clusters) / 2)


def ari_by_loops(labels, clusters):
    pairs = list(itertools.combinations(range(len(labels)), 2))
    same = [(labels[a] == labels[b], clusters[a] == clusters[b]) for a, b in pairs]
    in_both = sum(a and b for a, b in same)
    of_labels, of_clusters = sum(a for a, _ in same), sum(b for _, b in same)
    expected = of_labels * of_clusters / len(pairs)
    return (in_both - expected) / ((of_labels + of_clusters) / 2 - expected)


def evaluation(splits=SPLITS):
    return Evaluation(None, splits.__getitem__, "test", None, None, Path())


def head(by="targets"):
    """Prototypes at the axes of y = (x_0, x_1); the centre forbids the third as a target."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [-1.0, 0.0], [0.0, -1.0]])
    constant = torch.tensor([0.0, 0.0, 0.0, 30.0, 0.0])  # 3 wins by its logit wherever it comes close
    targets = (lambda scores: (scores - 99.0 * (torch.arange(5) == 2)).softmax(dim=1)) if by == "targets" else None
    return Components(weight, 0.1, constant, lambda x: torch.nn.functional.normalize(x[:, :2], dim=1), targets)


@pytest.mark.parametrize("by", ["targets", "logits"])
def test_the_clusters_of_a_head_are_its_prototypes(by, monkeypatch):
    monkeypatch.setattr(module, "open_components", lambda *_, **__: head(by))
    rng = np.random.default_rng(0)
    splits = {
        name: Features(rng.normal(size=(count, 4)).astype(np.float32), np.arange(count) % 3, ["a", "b", "c"])
        for name, count in {"train": 60, "test": 30}.items()
    }
    found = {metric.name: metric for metric in clustering(evaluation(splits), ClusteringOptions(seeds=2))}

    def choices(x):
        y = x[:, :2] / np.linalg.norm(x[:, :2], axis=1, keepdims=True)
        scores = y @ head(by).prototypes.numpy().T
        if by == "targets":
            scores[:, 2] = -np.inf
            return scores.argmax(axis=1).tolist()
        return (10 * scores + head(by).log_normalizer.numpy()).argmax(axis=1).tolist()

    labels, clusters = splits["test"].labels.tolist(), choices(splits["test"].x)
    assert found["nmi_prototypes"].value == pytest.approx(nmi_by_loops(labels, clusters))
    assert found["ari_prototypes"].value == pytest.approx(ari_by_loops(labels, clusters))
    used = len(set(choices(splits["train"].x)))
    assert found["nmi_prototypes"].options == {"clusters": used, "by": by}
    assert found["ari_kmeans@prototypes"].options["clusters"] == used
    assert found["ari_kmeans"].options["clusters"] == 3
    assert list(found) == [f"{measure}_{kind}" for kind in ("prototypes", "kmeans", "kmeans@prototypes")
                           for measure in ("nmi", "ari")]  # fmt: skip


def test_kmeans_is_a_mean_over_seeds_of_what_it_finds_on_train_images(monkeypatch):
    fits = {}

    class Recorded(module.KMeans):
        def fit(self, x):
            fits[self.n_clusters, self.random_state] = super().fit(x)
            np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-6)
            assert len(x) == 90
            return self

    monkeypatch.setattr(module, "KMeans", Recorded)
    found = {metric.name: metric for metric in clustering(evaluation(), ClusteringOptions(seeds=3, clusters=(7,)))}
    assert found.keys() == {"nmi_kmeans", "ari_kmeans", "nmi_kmeans@7", "ari_kmeans@7"}
    assert found["nmi_kmeans"].value == found["ari_kmeans"].value == 1  # the blobs lie far apart
    x = SPLITS["test"].x / np.linalg.norm(SPLITS["test"].x, axis=1, keepdims=True)
    for name, measure in {"nmi_kmeans@7": nmi_by_loops, "ari_kmeans@7": ari_by_loops}.items():
        values = []
        for seed in range(3):
            centres = fits[7, seed].cluster_centers_
            nearest = [min(range(7), key=lambda k: ((image - centres[k]) ** 2).sum()) for image in x]
            values.append(measure(SPLITS["test"].labels.tolist(), nearest))
        assert found[name].value == pytest.approx(np.mean(values))
        assert found[name].options == {"clusters": 7, "seeds": 3, "sd": pytest.approx(np.std(values, ddof=1))}
        assert 0.2 < found[name].value < 0.95


def test_lengths_and_dtypes_do_not_matter():
    lengths = np.random.default_rng(0).uniform(1, 5, size=(90, 1))
    half = {name: split._replace(x=(8 * split.x).astype(np.float16)) for name, split in SPLITS.items()}
    longer = SPLITS | {"train": SPLITS["train"]._replace(x=(SPLITS["train"].x * lengths).astype(np.float32))}
    for splits in (half, longer):
        assert [metric.value for metric in clustering(evaluation(splits), ClusteringOptions(seeds=1))] == [1, 1]


def test_a_draw_of_train_images_is_in_their_order():
    train = Features(np.arange(30.0)[:, None], np.arange(30), [])
    some = train.at_most(12)
    assert len(some.labels) == 12
    assert np.array_equal(some.x[:, 0], some.labels)
    assert np.all(np.diff(some.labels) > 0)
    assert np.array_equal(some.labels, train.at_most(12).labels)
    assert train.at_most(30) is train
    (nmi, _) = clustering(evaluation(), ClusteringOptions(seeds=1, images=40))
    assert "sd" not in nmi.options


def test_what_it_needs():
    one_class = SPLITS | {"train": SPLITS["train"]._replace(labels=np.zeros(90, int))}
    with pytest.raises(NotApplicable, match="it needs images of at least two classes"):
        next(clustering(evaluation(one_class)))
    with pytest.raises(ValueError, match=r"`clusters` \(=91\) must be at most 90, the number of train images"):
        list(clustering(evaluation(), ClusteringOptions(clusters=(91,))))
    for options, message in [
        ({"clusters": (5, 1)}, r"`clusters` \(=\(5, 1\)\) must be at least 2"),
        ({"seeds": 0}, r"`seeds` \(=0\) must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            ClusteringOptions(**options)
