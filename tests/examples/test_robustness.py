"""Robustness: layouts of ImageNet-V2, -A, -R and -C, accuracies by loops, and the mean corruption error."""

from pathlib import Path

import numpy as np
import pytest

from evaluators.linear import robustness as module
from evaluators.linear.logistic_probe import fit_probe
from evaluators.linear.robustness import RobustnessOptions, robustness
from evaluators.linear.shifted_sets import (
    ALEXNET_ERRORS,
    class_numbers,
    corrupted_folders,
    mean_corruption_error,
    mean_over_corruptions,
)
from evaluators.protocol import Evaluation, Features, NotApplicable
from feature_blobs import blobs

CLASSES = ["n01", "n03", "n02", "n10"]  # sorted they would be others, which must not matter


def blob(seed, n, classes=4, spread=1.5):
    return blobs(seed, n, classes, spread=spread)._replace(classes=CLASSES[:classes])


SPLITS = {"train": blob(0, 80), "val": blob(1, 60), "test": blob(2, 100)}


def some_classes(seed, names):
    """Images of some classes, labelled by the alphabetical order of their folders."""
    drawn, names = blob(seed, 60, spread=2.5), sorted(names)
    kept = np.isin(drawn.labels, [CLASSES.index(name) for name in names])
    labels = [names.index(CLASSES[label]) for label in drawn.labels[kept]]
    return Features(drawn.x[kept], np.array(labels), names)


def evaluation(sets, asked=None):
    def elsewhere(dataset, data, whole=False):
        def features(split):
            if asked is not None:
                asked.append((str(data), split, whole))
            return sets[str(data)]

        return features

    return Evaluation(None, SPLITS.__getitem__, "test", None, None, Path(), "folder", elsewhere)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def by_loops(features, names):
    """The share of images whose own class has the largest probability of that probe among the named ones."""
    right, probe = 0, fit_probe(SPLITS["train"], SPLITS["val"])
    for scores, label in zip(probe.probabilities(features.x), features.labels, strict=True):
        among = {name: scores[CLASSES.index(name)] for name in names}
        right += max(among, key=among.__getitem__) == features.classes[label]
    return right / len(features.labels)


def test_a_set_of_some_classes_is_answered_among_them(here):
    sets = {"a": some_classes(5, ["n10", "n02"]), "all": blob(6, 60)}
    for name in sets:
        (here / name / CLASSES[0]).mkdir(parents=True)
    asked = []
    found = {
        metric.name: metric for metric in robustness(evaluation(sets, asked), RobustnessOptions(sets=("A=a", "all")))
    }
    assert found["top1"].value == pytest.approx(by_loops(SPLITS["test"], CLASSES))
    assert found["top1@all"].value == pytest.approx(by_loops(sets["all"], CLASSES))
    assert found["top1@A"].value == pytest.approx(by_loops(sets["a"], ["n02", "n10"]))
    assert found["top1@A"].value > by_loops(sets["a"], CLASSES), "an answer must have been ruled out"
    same = np.isin(SPLITS["test"].labels, [2, 3])
    clean = SPLITS["test"]._replace(x=SPLITS["test"].x[same], labels=SPLITS["test"].labels[same])
    assert found["top1@A"].options["clean"] == pytest.approx(by_loops(clean, ["n02", "n10"]))
    assert (found["top1@A"].options["classes"], found["top1@A"].options["n"]) == (2, len(sets["a"].labels))
    assert found["top1@all"].options["clean"] == found["top1"].value
    assert asked == [("a", "train", False), ("all", "train", False)]  # folders without splits
    _, among_all = robustness(evaluation(sets), RobustnessOptions(sets=("A=a",), all_classes=True))
    assert among_all.value == pytest.approx(by_loops(sets["a"], CLASSES))
    assert among_all.value < found["top1@A"].value
    assert among_all.options["clean"] == pytest.approx(by_loops(clean, CLASSES))


def test_the_probe_is_chosen_as_in_the_linear_protocol(here, monkeypatch):
    (metric,) = robustness_of_nothing(here, cs=(1e-4, 1.0))
    assert metric.options == {"classifier": "logistic", "C": 1.0}
    monkeypatch.setattr(module, "LOGISTIC_LIMIT", 80)
    (metric,) = robustness_of_nothing(here, lrs=(1e-6, 0.5), epochs=20, batch_size=20)
    assert metric.options == {"classifier": "sgd", "lr": 0.5}
    assert metric.value > 0.6


def robustness_of_nothing(here, **options):
    (here / "b" / "n01").mkdir(parents=True, exist_ok=True)
    return [*robustness(evaluation({"b": blob(7, 20)}), RobustnessOptions(sets=("b",), **options))][:1]


def test_classes_are_found_by_name_or_by_the_numbers_of_imagenet_v2():
    assert class_numbers(["n02", "n10"], CLASSES).tolist() == [2, 3]
    many = [f"n{number:04}" for number in range(12)]
    assert class_numbers(["0", "1", "10", "11", "2"], many).tolist() == [0, 1, 10, 11, 2]  # as text is sorted
    assert class_numbers(["1", "0"], ["0", "1", "2"]).tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"2 of 3 classes are none of the data's 4: cat, dog"):
        class_numbers(["cat", "n01", "dog"], CLASSES)
    with pytest.raises(ValueError, match=r"1 of 2 classes are none of the data's 12: 12"):
        class_numbers(["3", "12"], many)


def corrupted(root, names, severities=(1, 2, 3, 4, 5)):
    for name in names:
        for severity in severities:
            (root / name / str(severity) / "n01").mkdir(parents=True)


def test_corruptions_are_told_from_classes(tmp_path):
    corrupted(tmp_path / "C", ["fog", "snow"], (1, 5))
    assert corrupted_folders(tmp_path / "C") == {
        name: {severity: tmp_path / "C" / name / str(severity) for severity in (1, 5)} for name in ("fog", "snow")
    }
    corrupted(tmp_path / "grouped/weather", ["fog"], (3,))
    assert corrupted_folders(tmp_path / "grouped") == {"fog": {3: tmp_path / "grouped/weather/fog/3"}}
    (tmp_path / "V2/1").mkdir(parents=True)
    (tmp_path / "V2/1/5").touch()
    assert corrupted_folders(tmp_path / "V2") == {}


def test_a_corruption_is_the_mean_over_its_severities(here):
    corrupted(here / "C", ["fog", "spatter"], (1, 2))
    sets = {
        f"C/{name}/{severity}": blob(10 + place, 40 + severity, spread=1.5 * severity)
        for place, (name, severity) in enumerate((name, severity) for name in ("fog", "spatter") for severity in (1, 2))
    }
    asked = []
    found = {metric.name: metric for metric in robustness(evaluation(sets, asked), RobustnessOptions(sets=("C",)))}
    accuracy = {name: by_loops(features, CLASSES) for name, features in sets.items()}
    fog = (accuracy["C/fog/1"] + accuracy["C/fog/2"]) / 2
    assert found["top1@C/fog"].value == pytest.approx(fog)
    assert found["top1@C/fog"].options["by_severity"] == pytest.approx(
        {"1": accuracy["C/fog/1"], "2": accuracy["C/fog/2"]}
    )
    assert found["top1@C/spatter"].value == pytest.approx((accuracy["C/spatter/1"] + accuracy["C/spatter/2"]) / 2)
    assert found["top1@C"].value == pytest.approx(fog)  # spatter is ImageNet-C's own validation
    assert found["top1@C"].options["n"] == 41
    assert "mce@C" not in found
    assert asked == [(name, "train", True) for name in sets]
    assert mean_over_corruptions({"spatter": 0.5, "saturate": 0.7}) == pytest.approx(0.6)


def test_the_mean_corruption_error_is_the_papers():
    rng = np.random.default_rng(0)
    accuracy = {name: dict(zip(range(1, 6), rng.random(5), strict=True)) for name in [*ALEXNET_ERRORS, "spatter"]}
    ratios = []
    for name, alexnet in ALEXNET_ERRORS.items():
        of_model, of_alexnet = 0.0, 0.0
        for severity in range(1, 6):
            of_model += 1 - accuracy[name][severity]
            of_alexnet += alexnet  # what is published is the mean of the five
        ratios.append(of_model / of_alexnet)
    assert mean_corruption_error(accuracy) == pytest.approx(sum(ratios) / 15)
    alexnet = {name: dict.fromkeys(range(1, 6), 1 - error) for name, error in ALEXNET_ERRORS.items()}
    assert mean_corruption_error(alexnet) == pytest.approx(1)
    assert len(ALEXNET_ERRORS) == 15


@pytest.mark.parametrize("missing", [None, "fog/3", "images"])
def test_the_mean_corruption_error_needs_all_of_imagenet_c(missing, here, monkeypatch):
    monkeypatch.setattr(module, "IMAGENET_IMAGES", 41 if missing == "images" else 40)
    monkeypatch.setattr(module, "IMAGENET_CLASSES", 4)
    corrupted(here / "C", [*ALEXNET_ERRORS, "saturate"])
    if missing == "fog/3":
        (here / "C/fog/3/n01").rmdir()
    sets = {f"C/{name}/{s}": blob(20 + s, 40) for name in [*ALEXNET_ERRORS, "saturate"] for s in range(1, 6)}
    found = {metric.name: metric for metric in robustness(evaluation(sets), RobustnessOptions(sets=("C",)))}
    assert ("mce@C" in found) == (missing is None)
    if missing is None:
        mean = 1 - found["top1@C"].value  # every corruption has the same images here
        expected = np.mean([mean / alexnet for alexnet in ALEXNET_ERRORS.values()])
        assert found["mce@C"].value == pytest.approx(expected)
        assert found["mce@C"].options["baseline"] == "AlexNet"


def test_a_class_that_was_not_trained_is_no_answer(here, monkeypatch):
    rest = SPLITS["train"].labels != 3
    train = SPLITS["train"]._replace(x=SPLITS["train"].x[rest], labels=SPLITS["train"].labels[rest])
    monkeypatch.setitem(SPLITS, "train", train)
    (here / "d" / "n10").mkdir(parents=True)
    found = {
        metric.name: metric
        for metric in robustness(evaluation({"d": some_classes(8, ["n10", "n01"])}), RobustnessOptions(sets=("d",)))
    }
    assert found["top1@d"].value == 0.5  # all of n01 and none of n10


def test_what_it_needs(here):
    with pytest.raises(NotApplicable, match="it needs other images of the same classes: --sets NAME=DATA"):
        next(robustness(evaluation({})))
    with pytest.raises(FileNotFoundError, match=r"`sets` \(='nowhere'\) must be photos, digits, a folder or hub:NAME"):
        next(robustness(evaluation({}), RobustnessOptions(sets=("C=nowhere",))))
    (here / "pets" / "cat").mkdir(parents=True)
    pets = {"pets": SPLITS["val"]._replace(classes=["cat", "dog", "n01", "n02"])}
    with pytest.raises(ValueError, match=r"`sets` \(=P=pets\) must be of the same classes; 2 of 4 classes are none of"):
        list(robustness(evaluation(pets), RobustnessOptions(sets=("P=pets",))))
    with pytest.raises(ValueError, match="must have two classes or more, or take `all_classes`: among one no answer"):
        list(robustness(evaluation({"pets": some_classes(5, ["n10"])}), RobustnessOptions(sets=("pets",))))
    for options, message in [
        ({"lrs": ()}, r"`lrs` \(=\(\)\) must be positive numbers, at least one"),
        ({"epochs": 0}, r"`epochs` \(=0\) must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            RobustnessOptions(**options)
