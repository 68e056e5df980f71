"""Fine-tuning: optimiser steps, ranks, the choice of the rate, and that a few epochs beat the frozen start."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from data.augment import EvalTransform
from data.images import Images
from devices import DEVICES
from evaluators.finetune import finetune as module
from evaluators.finetune.classifier import Classifier
from evaluators.finetune.finetune import finetune, predict, train
from evaluators.finetune.options import FinetuneOptions, SmallFinetuneOptions
from evaluators.protocol import Evaluation, NotApplicable
from finetune_fixtures import photos, tiny_encoder
from gloo import run_on_ranks

PLAIN = FinetuneOptions(
    **{"lr": (3e-3,), "lr_batch": 64, "batch_size": 64, "warmup_epochs": 1, "layer_decay": 0.9, "drop_path": 0.0},
    **{"head_scale": 1.0, "mixup": 0.0, "cutmix": 0.0, "augment": False, "erase": 0.0, "num_workers": 0},
)
"""A small network learns nothing in a few epochs from images as distorted as the recipe has them."""


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only get in each other's way in networks as small as these
    yield
    torch.set_num_threads(threads)


def weights(network):
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def test_first_step_has_the_learning_rate_of_its_layer():
    encoder, images = tiny_encoder(), photos("train", 32)
    options = dataclasses.replace(PLAIN, epochs=1, warmup_epochs=0, batch_size=32, layer_decay=0.5)
    torch.manual_seed(options.seed)
    start = weights(Classifier(encoder, len(images.classes), drop_path=0.0))
    end = weights(train(encoder, images, options, lr=0.01))
    for name, scale in [
        ("head.weight", 1),
        ("model.layers.1.mlp.fc1.weight", 0.5),
        ("model.layers.0.mlp.fc2.bias", 0.25),
    ]:
        lr = 0.01 * scale * 32 / 64  # for a batch of 32 at a rate for 64
        decay = 0 if name.endswith("bias") else 0.05
        # AdamW's first step is as long as the learning rate in every coordinate, whatever the gradient.
        step = (end[name] - start[name] * (1 - lr * decay)).abs()
        assert step.median().item() == pytest.approx(lr, rel=1e-3)
        assert step.max().item() <= lr * (1 + 1e-3)


def test_parts_of_a_batch_add_up_to_the_batch():
    encoder, images = tiny_encoder(), photos("train", 80)
    options = dataclasses.replace(PLAIN, epochs=2, batch_size=40, mixup=0.8, cutmix=1.0)
    whole = weights(train(encoder, images, options, 1e-3))
    parts = weights(train(encoder, images, dataclasses.replace(options, micro_batch=17), 1e-3))
    assert all(torch.allclose(whole[name], parts[name], atol=2e-5) for name in whole)


def test_moving_average_of_the_weights():
    encoder, images = tiny_encoder(), photos("train", 32)
    options = dataclasses.replace(PLAIN, epochs=1, warmup_epochs=0, batch_size=32)
    torch.manual_seed(options.seed)
    start = weights(Classifier(encoder, len(images.classes), drop_path=0.0))
    end = weights(train(encoder, images, options, 0.01))
    averaged = weights(train(encoder, images, dataclasses.replace(options, ema=0.75), 0.01))
    assert not torch.allclose(start["head.weight"], end["head.weight"], atol=1e-3)
    assert all(torch.allclose(averaged[name], 0.75 * start[name] + 0.25 * end[name], atol=1e-6) for name in start)


def head_trained_on_ranks(rank):
    options = dataclasses.replace(PLAIN, epochs=2, batch_size=16)
    encoder, images = tiny_encoder(), photos("train", 50)
    classifier = train(encoder, images, options, 1e-3)
    _, predicted = predict(classifier, photos("val", 41), EvalTransform(16), options)
    return {"head": classifier.head.weight.detach(), "predicted": torch.from_numpy(predicted)}


@pytest.mark.slow
def test_two_ranks_train_the_network_of_one():
    alone = head_trained_on_ranks(0)
    for found in run_on_ranks(head_trained_on_ranks):
        assert torch.allclose(found["head"], alone["head"], atol=2e-5)
        assert (found["predicted"] != alone["predicted"]).sum() <= 1  # a tie may be decided by rounding


@pytest.mark.parametrize("device", DEVICES)
def test_a_few_epochs_beat_the_frozen_start(device, monkeypatch):
    # A random network on a few hundred cells of photographs: fine-tuned, it must beat the best linear probe on it.
    encoder, splits = tiny_encoder(device=device), {"train": photos("train", 700), "val": photos("val", 300)}
    monkeypatch.setattr(module, "load_images", lambda dataset, split, data: splits[split])
    before = weights(encoder.model)
    transform = EvalTransform(16)
    x = {}
    for name, images in splits.items():
        with torch.no_grad():
            x[name] = encoder.cls(torch.stack([transform(image) for image, _ in images]).to(device)).cpu().numpy()
    probes = [LogisticRegression(C=c, max_iter=2000).fit(x["train"], splits["train"].labels) for c in (0.1, 1.0, 10.0)]
    frozen = max(probe.score(x["val"], splits["val"].labels) for probe in probes)

    given = Evaluation(encoder, None, "val", None, None, Path(), "photos")
    tuned, mean = finetune(given, dataclasses.replace(PLAIN, epochs=14))
    assert tuned.value > frozen + 0.05
    assert (tuned.name, mean.name) == ("top1", "per_class")
    assert tuned.value == np.mean(tuned.predictions == splits["val"].labels)
    recalls = [np.mean(tuned.predictions[splits["val"].labels == label] == label) for label in range(14)]
    assert mean.value == pytest.approx(np.mean(recalls))
    after = weights(encoder.model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_learning_rate_is_chosen_on_val(monkeypatch):
    loaded = []

    def few(dataset, split, data):
        loaded.append(split)
        return photos(split, 64)

    monkeypatch.setattr(module, "load_images", few)
    given = Evaluation(tiny_encoder(), None, "test", None, None, Path(), "photos")
    options = dataclasses.replace(PLAIN, epochs=3, lr=(1e-9, 3e-3))
    metric, _ = finetune(given, options)
    sweep = metric.options["val_top1_by_lr"]
    assert list(sweep) == ["1e-09", "0.003"]
    assert sweep["0.003"] > sweep["1e-09"]
    assert (metric.options["lr"], metric.options["n"]) == (3e-3, 64)
    assert loaded == ["train", "val", "test"]
    alone, _ = finetune(given, dataclasses.replace(options, lr=(3e-3,)))
    assert loaded[3:] == ["train", "test"]  # nothing to choose: no val split is needed
    assert np.array_equal(alone.predictions, metric.predictions)
    assert alone.options["val_top1_by_lr"] == {}


def test_published_recipes():
    # iBOT's run.sh and its evaluation README; for small sets 8 GPUs x 96 images.
    beit, deit = FinetuneOptions(), SmallFinetuneOptions()
    assert (beit.lr, beit.epochs, beit.layer_decay, beit.drop_path) == ((8e-4, 9e-4, 1e-3, 2e-3), 100, 0.65, 0.2)
    assert (deit.lr, deit.epochs, deit.layer_decay, deit.drop_path) == ((7.5e-6,), 1000, 1.0, 0.1)
    scale = deit.batch_size / deit.lr_batch
    assert (deit.lr[0] * scale, deit.min_lr * scale) == pytest.approx((1.125e-5, 1e-5))
    assert (beit.mixup, beit.cutmix, beit.smoothing, beit.erase) == (deit.mixup, deit.cutmix, 0.1, 0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": ()}, r"`lr` \(=\(\)\) must be positive numbers, at least one"),
        ({"lr": (1e-3, 0.0)}, r"`lr` \(=\(0.001, 0.0\)\) must be positive"),
        ({"batch_size": 33}, r"`batch_size` \(=33\) must be at most the number of train images \(=32\)"),
        ({"warmup_epochs": 100}, r"`warmup_epochs` \(=100\) must be below `epochs` \(=100\)"),
        ({"micro_batch": 0}, r"`micro_batch` \(=0\) must be positive"),
        ({"drop_path": 1.0}, r"`drop_path` \(=1.0\) must be in \[0, 1\)"),
    ],
)
def test_options_out_of_range(options, message, monkeypatch):
    monkeypatch.setattr(module, "load_images", lambda dataset, split, data: photos(split, 32))
    given = Evaluation(tiny_encoder(), None, "val", None, None, Path(), "photos")
    with pytest.raises(ValueError, match=message):
        list(finetune(given, dataclasses.replace(PLAIN, **{"batch_size": 32, "epochs": 100, **options})))


def test_pixels_and_missing_images_are_refused():
    for encoder, dataset in [(None, "photos"), (tiny_encoder(), None)]:
        with pytest.raises(NotApplicable, match="it needs a backbone and images: --data DIR"):
            list(finetune(Evaluation(encoder, None, "val", None, None, Path(), dataset)))


def test_a_loss_that_explodes_is_an_error():
    images = Images("few", "train", ["a", "b"], np.array([0, 1] * 4), [Image.new("RGB", (16, 16))] * 8)
    encoder = tiny_encoder()
    with torch.no_grad():
        encoder.model.layernorm.weight.fill_(torch.inf)
    options = dataclasses.replace(PLAIN, epochs=2, batch_size=8)
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 1: `lr` \(=0.01\) is too high"):
        train(encoder, images, options, 0.01)
