"""Fine-tuning: what is trained at which rate, what the images become, and that a few epochs beat the frozen start."""

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel, ViTMSNConfig, ViTMSNModel

from augment import EvalTransform
from data import Images, load_images
from devices import DEVICES
from encoder import as_encoder
from evaluators import finetune as module
from evaluators.classifier import Classifier, layer_decay_groups
from evaluators.finetune import finetune, predict, train
from evaluators.finetune_data import (
    FinetuneDataset,
    FinetuneTransform,
    erase_rectangle,
    mix,
    sample_batches,
    soft_targets,
)
from evaluators.finetune_options import FinetuneOptions, SmallFinetuneOptions
from evaluators.protocol import Evaluation, NotApplicable
from evaluators.rand_augment import FILL, OPERATIONS, rand_augment
from gloo import run_on_ranks

TINY = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
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


def tiny_encoder(kind=ViTModel, device="cpu"):
    config = {ViTModel: ViTConfig, ViTMSNModel: ViTMSNConfig, Dinov2Model: Dinov2Config}[kind]
    options = {} if kind is ViTMSNModel else {"initializer_range": 0.15}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config(**TINY, intermediate_size=64, **options))
    return as_encoder(model.to(device), "tiny")


def photos(split, count=None):
    images = load_images("photos", split)
    rows = np.random.default_rng(0).permutation(len(images))[:count]
    return dataclasses.replace(images, labels=images.labels[rows], items=[images.items[row] for row in rows])


def weights(network):
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def classifier_of(encoder, **options):
    torch.manual_seed(0)
    return Classifier(encoder, 3, **{"drop_path": 0.0, **options})


@pytest.mark.parametrize("kind", [ViTModel, ViTMSNModel, Dinov2Model])
def test_layer_decay_by_hand(kind):
    classifier = classifier_of(tiny_encoder(kind))
    groups = layer_decay_groups(classifier, weight_decay=0.05, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in classifier.named_parameters()}
    found = {
        names[id(parameter)].removeprefix("model."): (group["lr_scale"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    blocks = "encoder.layer" if kind is Dinov2Model else "layers"
    norm1 = "norm1" if kind is Dinov2Model else "layernorm_before"
    expected = {
        **{"embeddings.cls_token": (0.125, 0), "embeddings.position_embeddings": (0.125, 0)},
        "embeddings.patch_embeddings.projection.weight": (0.125, 0.05),
        "embeddings.patch_embeddings.projection.bias": (0.125, 0),
        f"{blocks}.0.mlp.fc1.weight": (0.25, 0.05),
        f"{blocks}.0.{norm1}.weight": (0.25, 0),
        f"{blocks}.1.mlp.fc2.weight": (0.5, 0.05),
        f"{blocks}.1.mlp.fc2.bias": (0.5, 0),
        **{"layernorm.weight": (1, 0), "head.weight": (1, 0.05), "head.bias": (1, 0)},
    }
    assert {name: found[name] for name in expected} == expected
    assert sum(len(group["params"]) for group in groups) == len(found)
    left_out = {name for name, parameter in classifier.named_parameters() if not parameter.requires_grad}
    assert {name.removeprefix("model.") for name in names.values()} - set(found) == {
        name.removeprefix("model.") for name in left_out
    }
    assert all("pooler" in name or "mask_token" in name for name in left_out)  # what gets no gradient


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


@pytest.mark.parametrize("mean_patch", [False, True])
def test_logits_are_linear_in_the_encoders_tokens(mean_patch):
    encoder = tiny_encoder()
    classifier = classifier_of(encoder, mean_patch=mean_patch).eval()
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        tokens = encoder.patches(images).mean(dim=(1, 2)) if mean_patch else encoder.cls(images)
        assert torch.allclose(classifier(images), classifier.head(tokens), atol=1e-5)
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    assert classifier.head.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert classifier_of(encoder, head_scale=0.001).head.weight.std().item() == pytest.approx(2e-5, rel=0.2)


def test_drop_path_acts_in_training_alone():
    classifier = classifier_of(tiny_encoder(), drop_path=0.9)
    images = torch.randn(8, 3, 16, 16)
    first, second = (classifier.eval()(images) for _ in range(2))
    assert torch.equal(first, second)
    first, second = (classifier.train()(images) for _ in range(2))
    assert not torch.allclose(first, second)
    assert torch.equal(classifier_of(tiny_encoder()).train()(images), classifier_of(tiny_encoder()).eval()(images))


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


def test_soft_targets_by_hand():
    expected = torch.tensor([[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]])
    assert torch.allclose(soft_targets(torch.tensor([2, 0]), 4, 0.2), expected)


def test_mixup_blends_images_and_targets_alike():
    images, targets = torch.randn(5, 3, 8, 8), torch.eye(5)
    shares = []
    for seed in range(200):
        mixed, mixed_targets = mix(images, targets, random.Random(seed), mixup=0.8, cutmix=0)
        share = mixed_targets[0, 0].item()
        assert torch.allclose(mixed_targets[0], torch.tensor([share, 0, 0, 0, 1 - share]))
        assert torch.allclose(mixed[1], share * images[1] + (1 - share) * images[3], atol=1e-5)
        assert torch.allclose(mixed[2], images[2], atol=1e-5)  # its own partner
        shares.append(share)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.1)
    assert np.var(shares) == pytest.approx(1 / (4 * 2.6), rel=0.25)  # of Beta(0.8, 0.8)


def test_cutmix_pastes_what_the_targets_say():
    images, targets = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 20, 30), torch.eye(4)
    shares = []
    for seed in range(200):
        mixed, mixed_targets = mix(images, targets, random.Random(seed), mixup=0, cutmix=1.0)
        own = mixed[0, 0] == 0
        share = own.float().mean().item()
        assert torch.equal(mixed[0, 0][~own], torch.full(((~own).sum(),), 3.0))
        assert mixed_targets[0].tolist() == pytest.approx([share, 0, 0, 1 - share], abs=1e-6)
        rows, columns = (~own).any(dim=1), (~own).any(dim=0)
        assert (~own).sum() == rows.sum() * columns.sum()  # a rectangle
        shares.append(share)
    assert min(shares) < 0.3
    assert max(shares) > 0.95
    assert torch.equal(images[:, 0, 0, 0], torch.arange(4.0))  # not changed


def test_mixing_takes_either_or_none():
    images, targets = torch.randn(2, 3, 8, 8), torch.eye(2)
    assert mix(images, targets, random.Random(0), mixup=0, cutmix=0) == (images, targets)
    pasted = [
        bool((mixed == images).any() and (mixed != images).any())
        for mixed, _ in (mix(images, targets, random.Random(seed), mixup=0.8, cutmix=1.0) for seed in range(200))
    ]
    assert 60 < sum(pasted) < 140


def test_erased_rectangles():
    areas = []
    for seed in range(100):
        image = erase_rectangle(torch.full((3, 40, 60), 9.0), random.Random(seed))
        erased = (image != 9).all(dim=0)
        rows, columns = erased.any(dim=1).sum(), erased.any(dim=0).sum()
        assert erased.sum() == rows * columns
        assert 0.25 < rows / columns < 4
        areas.append(erased.float().mean().item())
        assert abs(image[:, erased].mean()) < 0.5
        assert 0.5 < image[:, erased].std() < 1.5
    assert 0.015 < min(areas) < 0.06
    assert 0.25 < max(areas) < 0.35
    assert torch.equal(
        erase_rectangle(torch.zeros(3, 40, 60), random.Random(7)),
        erase_rectangle(torch.zeros(3, 40, 60), random.Random(7)),
    )


def test_augmentation_operations_by_hand():
    rng = np.random.default_rng(0)
    pixels = rng.integers(20, 220, (40, 50, 3)).astype(np.uint8)
    image, old = Image.fromarray(pixels), pixels.astype(int)
    new = {name: np.asarray(operation(image, 0.9, 1.0)).astype(int) for name, operation in OPERATIONS.items()}
    assert (new["auto-contrast"].min(), new["auto-contrast"].max()) == (0, 255)
    assert np.ptp(new["equalize"]) > np.ptp(old)
    assert np.array_equal(new["invert"], 255 - old)
    assert (new["rotate"][0, 0] == FILL).all()
    assert np.array_equal(new["posterize"], old & 128)  # one bit, of 4 - int(3.6)
    assert np.array_equal(new["solarize"], np.where(old < 26, old, 255 - old))
    assert np.array_equal(new["solarize-add"], np.where(old < 128, old + 99, old))
    assert np.ptp(new["color"], axis=2).mean() > 1.3 * np.ptp(old, axis=2).mean()
    assert new["contrast"].std() > 1.4 * old.std()
    assert np.allclose(new["brightness"], np.minimum(old * 1.81, 255), atol=1)
    assert new["sharpness"].std() > 1.1 * old.std()
    assert (new["shear-x"][-1, -10:] == FILL).all()  # the last row is shifted by 0.27 of the height
    assert np.abs(new["shear-x"][0] - old[0]).mean() < 20
    assert (new["shear-y"][-10:, -1] == FILL).all()
    for name, axis in [("shift-x", 1), ("shift-y", 0)]:
        shifted = np.asarray(OPERATIONS[name](image, 8 / 9, 1.0)).swapaxes(0, axis)  # 0.4 of the side: whole pixels
        kept = round(0.6 * len(shifted))
        assert np.array_equal(shifted[:kept], old.swapaxes(0, axis)[-kept:])
        assert (shifted[kept:] == FILL).all()
    for operation in OPERATIONS.values():
        for sign in (-1.0, 1.0):
            changed = operation(image, 1.0, sign)
            assert (changed.size, changed.mode) == (image.size, "RGB")


def test_random_augmentation_repeats_and_varies():
    image = photos("train", 1)[0][0]
    first = [np.asarray(rand_augment(image, random.Random(seed))) for seed in range(40)]
    again = [np.asarray(rand_augment(image, random.Random(seed))) for seed in range(40)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert 5 <= sum(np.array_equal(a, np.asarray(image)) for a in first) <= 15  # both operations left out: a quarter


def test_samples_depend_on_their_numbers_alone():
    images = photos("train", 6)
    dataset = FinetuneDataset(images, FinetuneTransform(16), seed=3)
    tensors = []
    for sample in [(0, 2, 0), (0, 2, 1), (0, 5, 0), (1, 2, 0)]:
        tensor, label = dataset[sample]
        assert label == images.labels[sample[1]]
        assert torch.equal(tensor, FinetuneDataset(images, FinetuneTransform(16), seed=3)[sample][0])
        assert tensor.shape == (3, 16, 16)
        tensors.append(tensor)
    tensors.append(FinetuneDataset(images, FinetuneTransform(16), seed=4)[0, 2, 0][0])
    assert not any(torch.equal(a, b) for index, a in enumerate(tensors) for b in tensors[:index])


def test_batches_of_all_epochs():
    plain = list(sample_batches(23, 6, 2, seed=0))
    assert [len(batch) for batch in plain] == [6] * 6
    seen = [{index for batch in plain[first : first + 3] for _, index, _ in batch} for first in (0, 3)]
    assert [len(indices) for indices in seen] == [18, 18]  # none twice in an epoch
    assert seen[0] != seen[1]
    assert [{epoch for epoch, _, _ in batch} for batch in plain] == [{0}] * 3 + [{1}] * 3
    assert plain == list(sample_batches(23, 6, 2, seed=0))
    repeated = list(sample_batches(24, 6, 1, seed=0, repeats=3))
    assert len(repeated) == 4  # as many as without
    assert all([repetition for _, _, repetition in batch] == [0, 1, 2] * 2 for batch in repeated)
    assert len({index for batch in repeated for _, index, _ in batch}) == 8


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
