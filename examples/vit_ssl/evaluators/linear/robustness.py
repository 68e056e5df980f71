"""Robustness: one linear classifier, trained once on frozen features, tested on other sets of the same classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from evaluators.linear.linear import LOGISTIC_LIMIT, LRS
from evaluators.linear.logistic_probe import CS, fit_probe
from evaluators.linear.sgd_probe import Schedule, predict, stored_epochs, to_device, train_probes
from evaluators.linear.shifted_sets import (
    ALEXNET_ERRORS,
    IMAGENET_CLASSES,
    IMAGENET_IMAGES,
    SEVERITIES,
    class_numbers,
    corrupted_folders,
    mean_corruption_error,
    mean_over_corruptions,
)
from evaluators.ood.out_sets import OutSet, parse_out_sets
from evaluators.protocol import Evaluation, Features, Metric, NotApplicable

Scores = Callable[[np.ndarray], np.ndarray]
"""Features (N, D) -> a score for every class (N, C); the classifier answers with the largest."""


@dataclass(frozen=True)
class RobustnessOptions:
    """One linear probe on several test sets of the same classes, such as ImageNet-V2, -A, -R and -C. Sets are
    NAME=DATA, where DATA is a folder of class folders, or of CORRUPTION/SEVERITY/CLASS, or hub:NAME."""

    sets: tuple[str, ...] = ()
    """Test sets, for instance --sets V2=imagenetv2-matched-frequency-format-val A=imagenet-a R=imagenet-r
    C=ImageNet-C. Of sets with splits --split is taken."""
    all_classes: bool = False
    """Answer with any class of the data also where a set has some of them alone. Without it the answer is one of the
    set's classes, as the authors of ImageNet-A and -R have it."""
    classifier: Literal["auto", "logistic", "sgd"] = "auto"
    """The probe on [CLS], as in the protocol linear: logistic, with C chosen on val; sgd, with the learning rate chosen
    on val; auto takes logistic for fewer than 50 000 train images."""
    cs: tuple[float, ...] = CS
    """For logistic: scikit-learn's inverse strengths of regularisation."""
    lrs: tuple[float, ...] = LRS
    """For sgd: the learning rates for a batch of 256, scaled by batch_size / 256."""
    epochs: int = 100
    """For sgd: how often the train images are seen."""
    batch_size: int = 1024
    """For sgd: images in a batch, over all ranks."""
    seed: int = 0
    """For sgd: the seed of initial weights and order."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` (={getattr(self, name)}) must be at least 1")
        for name in ("lrs", "cs"):
            if not getattr(self, name) or min(getattr(self, name)) <= 0:
                raise ValueError(f"`{name}` (={getattr(self, name)}) must be positive numbers, at least one")


class Result(NamedTuple):
    """How often the classifier is right on a set."""

    top1: float
    images: int
    classes: int
    clean: float | None
    """Top-1 on the evaluated split's images of the same classes, by the same rule; None where there are none."""


def robustness(evaluation: Evaluation, options: RobustnessOptions = RobustnessOptions()) -> Iterator[Metric]:
    """Yield the top-1 accuracy of one linear probe on the evaluated split, `top1`, and on every other set.

    - `top1@SET`: of ImageNet-V2 (Recht et al., 2019) over all classes. Where a set has some of the classes alone, the
      answer is the largest logit among these, as the authors of ImageNet-A (Hendrycks et al., 2021a) and ImageNet-R
      (Hendrycks et al., 2021b) have it. `clean` in the options is the accuracy on the evaluated split's images of the
      same classes, by the same rule.
    - `top1@SET/CORRUPTION`, of a folder CORRUPTION/SEVERITY/CLASS: the mean over the severities. `top1@SET` is then the
      mean over the corruptions, without the four that ImageNet-C (Hendrycks and Dietterich, 2019) has for validation.
    - `mce@SET`: of the whole ImageNet-C alone, its mean corruption error, where AlexNet's is 1.

    Images are cropped and resized as those of the data; those of CORRUPTION/SEVERITY/CLASS are not cropped, because
    ImageNet-C's have been. Nothing is chosen on the sets.

    Raises:
        NotApplicable: no set is named, or there are no images.
        ValueError: a set has a class that is none of the data's, or one class alone.
        FileNotFoundError: there is no such set.
    """
    found = parse_out_sets({"sets": options.sets})
    if not found:
        raise NotApplicable("it needs other images of the same classes: --sets NAME=DATA")
    classes = evaluation.features("train").classes
    scores, notes = _classifier(evaluation, options)
    clean = evaluation.features(evaluation.split)
    clean_scores = scores(clean.x)

    def result(one: OutSet, features: Features) -> Result:
        try:
            numbers = class_numbers(features.classes, classes)
        except ValueError as error:
            raise ValueError(
                f"`sets` (={one.name}={one.data or one.dataset}) must be of the same classes; {error}"
            ) from None
        if len(numbers) == 1 and not options.all_classes:
            given = f"`sets` (={one.name}={one.data or one.dataset})"
            raise ValueError(
                f"{given} must have two classes or more, or take `all_classes`: among one no answer is wrong"
            )
        among, same = np.arange(len(classes)) if options.all_classes else numbers, np.isin(clean.labels, numbers)
        on_clean = _right(clean_scores[same], clean.labels[same], among) if same.any() else None
        on_set = _right(scores(features.x), numbers[features.labels], among)
        return Result(on_set, len(features.labels), len(numbers), on_clean)

    yield Metric("top1", _right(clean_scores, clean.labels, np.arange(len(classes))), notes)
    for one in found:
        about = notes | {"set": one.name}
        folders = corrupted_folders(one.data) if one.dataset == "folder" and one.data else {}
        if folders:
            results = {
                corruption: {
                    severity: result(one, evaluation.features_elsewhere("folder", folder, whole=True)("train"))
                    for severity, folder in by_severity.items()
                }
                for corruption, by_severity in folders.items()
            }
            yield from _corrupted(one.name, results, about)
        else:
            features = evaluation.features_elsewhere(one.dataset, one.data)(one.split(evaluation.split))
            yield Metric(f"top1@{one.name}", *_as_options(result(one, features), about))


def _corrupted(name: str, results: Mapping[str, Mapping[int, Result]], about: dict[str, Any]) -> Iterator[Metric]:
    by_severity = {
        corruption: {severity: one.top1 for severity, one in found.items()} for corruption, found in results.items()
    }
    means = {corruption: float(np.mean(list(found.values()))) for corruption, found in by_severity.items()}
    every = [one for found in results.values() for one in found.values()]
    # The copies of one image are right or wrong together: an image counts once.
    _, common = _as_options(min(every, key=lambda one: one.images), about)
    of_all = common | {"corruptions": len(results)}
    yield Metric(f"top1@{name}", mean_over_corruptions(means), of_all)
    whole = all(one.images == IMAGENET_IMAGES and one.classes == IMAGENET_CLASSES for one in every)
    if whole and all(set(by_severity.get(corruption, ())) == set(SEVERITIES) for corruption in ALEXNET_ERRORS):
        yield Metric(f"mce@{name}", mean_corruption_error(by_severity), of_all | {"baseline": "AlexNet"})
    for corruption, value in means.items():
        severities = {str(severity): top1 for severity, top1 in by_severity[corruption].items()}
        yield Metric(f"top1@{name}/{corruption}", value, common | {"corruption": corruption, "by_severity": severities})


def _as_options(one: Result, about: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    return one.top1, about | {"n": one.images, "classes": one.classes, "clean": one.clean}


def _right(scores: np.ndarray, labels: np.ndarray, among: np.ndarray) -> float:
    """Return the share of the images whose label (N,) has the largest score among the classes `among`."""
    among = np.unique(among)
    return float(np.mean(among[scores[:, among].argmax(axis=1)] == labels))


def _classifier(evaluation: Evaluation, options: RobustnessOptions) -> tuple[Scores, dict[str, Any]]:
    train, val = evaluation.features("train"), evaluation.features("val")
    logistic = options.classifier == "logistic"
    if options.classifier == "auto":
        logistic = len(train.labels) < LOGISTIC_LIMIT
    if logistic:
        probe = fit_probe(train, val, cs=options.cs)

        def probabilities(x: np.ndarray) -> np.ndarray:
            found = np.full((len(x), len(train.classes)), -np.inf)  # classes without train images are no answer
            found[:, probe.classifier.classes_] = probe.probabilities(x)
            return found

        return probabilities, {"classifier": "logistic", "C": probe.notes["C"]}
    schedule = Schedule(options.lrs, options.epochs, options.batch_size, options.seed)
    epochs = stored_epochs({"cls": train}, np.arange(len(train.labels)), schedule)
    probes = train_probes(epochs, {"cls": train.x.shape[1]}, len(train.classes), schedule)["cls"]
    best = int((predict(probes, val.x) == val.labels).mean(axis=1).argmax())

    @torch.inference_mode()
    def logits(x: np.ndarray) -> np.ndarray:
        return probes.layers[best](to_device(x)).cpu().numpy()

    return logits, {"classifier": "sgd", "lr": options.lrs[best]}
