"""Features: their order, what is left out, what is kept on disk, and what two ranks make of them."""

import dataclasses
import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTModel

from data.augment import EvalTransform
from data.images import Images, load_images
from evaluators.features import feature_cache
from evaluators.features.encoder import as_encoder
from evaluators.features.extraction import Chunk, Extraction, encode, features_of
from evaluators.knn import predict as predict_knn
from evaluators.linear.attentive_probe import train_attentive_probes
from evaluators.linear.augmented_epochs import FlippedCrop, augmented_epochs
from evaluators.linear.sgd_probe import Schedule, stored_epochs, train_probes
from evaluators.linear.sgd_probe import predict as predict_linear
from evaluators.ood.scores import fit_scores
from evaluators.protocol import Evaluation
from evaluators.prototypes.clustering import ClusteringOptions, clustering
from gloo import run_on_ranks
from runtime.distributed import device


def tiny_encoder(seed=0, heads=2):
    config = ViTConfig(
        **{"image_size": 16, "patch_size": 8, "hidden_size": 8, "num_hidden_layers": 3, "intermediate_size": 16},
        num_attention_heads=heads,
        initializer_range=0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return as_encoder(ViTModel(config, add_pooling_layer=False), "tiny")


def make_folder(root):
    """5 classes x 4 training images and 3 of val; the third class has a text file and a truncated image."""
    rng = np.random.default_rng(0)
    for split, count in [("train", 4), ("val", 3)]:
        for label in range(5):
            folder = root / split / f"class {label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 200, (20, 24, 3)) + 10 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    (root / "train/class 2/1.png").write_text("no image")
    whole = (root / "train/class 2/3.png").read_bytes()
    (root / "train/class 2/3.png").write_bytes(whole[: len(whole) // 2])
    return root


READABLE = np.setdiff1d(np.arange(20), [9, 11])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"))


def expected_features(folder, split, kind, rows):
    encoder = tiny_encoder()
    images = load_images("folder", split, data=folder)
    batch = torch.stack([EvalTransform(16)(images[row][0]) for row in rows])
    with torch.no_grad():
        hidden = encoder.model(batch, output_hidden_states=True).hidden_states
        tokens = [encoder.model.layernorm(state) for state in hidden[1:]]
    return {
        "cls": tokens[-1][:, 0],
        "last4": torch.cat([state[:, 0] for state in tokens], dim=1),  # there are three blocks
        "cls+mean_patch": torch.cat([tokens[-1][:, 0], tokens[-1][:, 1:].mean(dim=1)], dim=1),
        "patches": torch.cat([tokens[-1][:, number] for number in range(1, 5)], dim=1),
    }[kind].numpy()


@pytest.mark.parametrize("kind", ["cls", "last4", "cls+mean_patch", "patches"])
@pytest.mark.parametrize("cached", [False, True])
def test_unreadable_images_are_left_out_and_named(folder, kind, cached, tmp_path, capsys):
    cache = tmp_path / "features" if cached else None
    extraction = Extraction(tiny_encoder(), "folder", folder, 16, cache=cache, batch_size=3)
    found = features_of(extraction)("train", kind)
    np.testing.assert_allclose(found.x, expected_features(folder, "train", kind, READABLE), atol=1e-5)
    assert found.labels.tolist() == (READABLE // 4).tolist()
    assert found.classes == [f"class {label}" for label in range(5)]
    first, *named = capsys.readouterr().err.splitlines()[-3:]
    assert first == "2 of 20 train images are left out:"
    assert ["class 2/1.png" in named[0], "class 2/3.png" in named[1]] == [True, True]


@pytest.mark.parametrize(("size", "keep"), [(104, 1.0), (112, 224 / 256)])
def test_small_images_are_used_whole_and_others_as_imagenets_are(size, keep, folder):
    image = load_images("folder", "val", data=folder)[4][0]
    found = features_of(Extraction(None, "folder", folder, size))("val")
    assert np.array_equal(found.x[4], EvalTransform(size, keep=keep)(image).flatten().numpy())


def test_a_split_without_readable_images(tmp_path):
    (tmp_path / "train/cat").mkdir(parents=True)
    (tmp_path / "train/cat/a.jpg").write_bytes(b"\xff\xd8")
    for cache in (None, tmp_path / "features"):
        with pytest.raises(ValueError, match=r"none of the 1 images of the train split can be read; .*a\.jpg"):
            features_of(Extraction(tiny_encoder(), "folder", tmp_path, 16, cache=cache))("train")


def test_pixels_and_unknown_kinds():
    images = load_images("digits", "val")
    pixels = features_of(Extraction(None, "digits", None, 16))("val")
    assert np.array_equal(pixels.x[7], EvalTransform(16)(images[7][0]).flatten().numpy())
    with pytest.raises(ValueError, match=r"`kind` \(='CLS'\) must be one of cls, last4, cls\+mean_patch"):
        features_of(Extraction(None, "digits", None, 16))("val", "CLS")


def forbid_extraction(monkeypatch):
    def extract(*arguments, **options):
        raise AssertionError("extracted again")
        yield

    monkeypatch.setattr("evaluators.features.extraction.extract", extract)


def test_features_are_extracted_once(folder, tmp_path, monkeypatch):
    extraction = Extraction(tiny_encoder(), "folder", folder, 16, cache=tmp_path)
    source = features_of(extraction)
    first = source("train")
    forbid_extraction(monkeypatch)
    assert source("train") is first
    again = features_of(extraction)("train")  # as another process would
    assert isinstance(again.x, np.memmap)
    assert again.x.dtype == np.float32
    assert np.array_equal(again.x, first.x)
    assert np.array_equal(again.labels, first.labels)
    assert again.classes == first.classes
    torch.from_numpy(again.x)  # which warns about arrays that cannot be written to
    (description,) = tmp_path.glob("train-cls-*/description.json")
    errors = json.loads(description.read_text())["unreadable"]
    assert [Path(error.split("'")[1]).name for error in errors] == ["1.png", "3.png"]


@pytest.mark.parametrize("name", ["x.bin", "labels.npy", "description.json"])
@pytest.mark.parametrize("size", [0, -7])
def test_features_that_were_cut_off_are_made_again(name, size, folder, tmp_path, capsys):
    extraction = Extraction(tiny_encoder(), "folder", folder, 16, cache=tmp_path)
    first = np.array(features_of(extraction)("val").x)
    (file,) = tmp_path.glob(f"val-cls-*/{name}")
    file.write_bytes(file.read_bytes()[:size])
    capsys.readouterr()
    again = features_of(extraction)("val")
    assert np.array_equal(again.x, first)
    assert "are damaged and made again" in capsys.readouterr().err
    file.unlink()
    assert np.array_equal(features_of(extraction)("val").x, first)


@pytest.mark.parametrize("name", ["x.bin", "labels.npy", "description.json", "SHA256SUMS"])
def test_features_with_a_flipped_bit_are_made_again(name, folder, tmp_path, capsys):
    extraction = Extraction(tiny_encoder(), "folder", folder, 16, cache=tmp_path)
    first = np.array(features_of(extraction)("val").x)
    (file,) = tmp_path.glob(f"val-cls-*/{name}")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    assert np.array_equal(features_of(extraction)("val").x, first)
    assert re.search(rf"are damaged and made again \(.*{name}", capsys.readouterr().err)
    features_of(extraction)("val")
    assert "made again" not in capsys.readouterr().err


def test_images_that_were_replaced_have_other_features(tmp_path):
    root = make_folder(tmp_path / "images")
    extraction = Extraction(tiny_encoder(), "folder", root, 16, cache=tmp_path / "features")
    first = np.array(features_of(extraction)("val").x)
    Image.new("RGB", (24, 20), "red").save(root / "val/class 1/0.png")
    changed = features_of(extraction)("val").x
    assert np.flatnonzero((changed != first).any(axis=1)).tolist() == [3]
    pixels = (root / "val/class 1/0.png").read_bytes()
    later = (root / "val/class 1/0.png").stat().st_mtime_ns + 10**9
    (root / "val/class 1/0.png").write_bytes(pixels)
    os.utime(root / "val/class 1/0.png", ns=(later, later))  # of equal size, but of another time
    features_of(extraction)("val")
    assert len(list((tmp_path / "features").iterdir())) == 3


def test_half_precision_halves_the_file(folder, tmp_path):
    half = features_of(Extraction(tiny_encoder(), "folder", folder, 16, cache=tmp_path, half=True, num_workers=1))(
        "val"
    )
    assert half.x.dtype == np.float16
    np.testing.assert_allclose(half.x, expected_features(folder, "val", "cls", range(15)), rtol=1e-3, atol=1e-3)
    (file,) = tmp_path.glob("*/x.bin")
    assert file.stat().st_size == 15 * 8 * 2


def test_whatever_changes_features_changes_the_fingerprint(folder):
    images = load_images("folder", "train", data=folder)
    one = Images("photos", "train", ["a"], np.zeros(1, np.int64), [])
    pictures = [dataclasses.replace(one, items=[Image.new("RGB", (4, 4), color)]) for color in ("red", "blue")]
    settings = {"kind": "cls", "size": 16}
    renamed = dataclasses.replace(images, items=[*images.items[:-1], Path("z.png")])
    model = tiny_encoder().model
    variants = [
        (model, images, settings),
        (tiny_encoder(seed=1).model, images, settings),
        (tiny_encoder(heads=4).model, images, settings),
        (None, images, settings),
        (model, images, settings | {"size": 24}),
        (model, load_images("folder", "val", data=folder), settings),
        (model, renamed, settings),
        (model, dataclasses.replace(images, labels=images.labels[::-1]), settings),
        *((model, picture, settings) for picture in pictures),
    ]
    found = [feature_cache.fingerprint(*variant) for variant in variants]
    assert len(set(found)) == len(found)
    assert feature_cache.fingerprint(tiny_encoder().model, images, dict(settings)) == found[0]


def test_an_interrupted_extraction_leaves_nothing(folder, tmp_path):
    images = load_images("folder", "val", data=folder)

    def chunks():
        yield Chunk(np.zeros((3, 2), np.float32), np.ones(3, bool), [])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        feature_cache.store(tmp_path / "some", chunks(), images.labels, images.classes)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="all ranks must share this file system"):
        feature_cache.load(tmp_path / "some")


def test_the_slower_of_two_processes_keeps_the_features_of_the_faster(tmp_path):
    whole = Chunk(np.ones((3, 2), np.float32), np.ones(3, bool), [])
    other = Chunk(np.zeros((3, 2), np.float32), np.ones(3, bool), [])

    def chunks():
        feature_cache.store(tmp_path / "some", [whole], np.arange(3), ["a"])
        yield other

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_cache.os, "getpid", iter([1, 2]).__next__)
        feature_cache.store(tmp_path / "some", chunks(), np.arange(3), ["a"])
    assert np.array_equal(feature_cache.load(tmp_path / "some")[0].x, whole.x)
    assert [path.name for path in tmp_path.iterdir()] == ["some"]


def test_epochs_of_crops(folder):
    encoder, images = tiny_encoder(), load_images("folder", "train", data=folder)
    schedule = Schedule((1.0,), epochs=2, batch_size=6, seed=5)
    rows = np.arange(4, 20)
    epochs = augmented_epochs(encoder, images, rows, ["cls", "last4"], schedule)
    first, again, second = list(epochs(0)), list(epochs(0)), list(epochs(1))
    order = np.random.default_rng([5, 0]).permutation(rows)
    assert [total for _, _, total in first] == [6, 6, 4]
    crop = FlippedCrop(16)
    for batch, (x, labels, _) in zip([order[:6], order[6:12], order[12:]], first, strict=True):
        kept = [row for row in batch if row in READABLE]
        assert labels.tolist() == [row // 4 for row in kept]
        views = torch.stack([crop(images[row][0], random.Random(f"5,0,{row}")) for row in kept])
        expected = encode(encoder, views, ["cls", "last4"])
        for kind in ("cls", "last4"):
            torch.testing.assert_close(x[kind], expected[kind], atol=1e-5, rtol=0)
    assert all(torch.equal(a[0]["cls"], b[0]["cls"]) for a, b in zip(first, again, strict=True))
    assert sum(len(labels) for _, labels, _ in second) == 14
    assert not np.array_equal(np.concatenate([a[1] for a in first]), np.concatenate([b[1] for b in second]))


def test_crops_are_flipped_in_half_of_the_cases_and_keep_8_per_cent_or_more():
    # Red grows to the right, so its slope tells the width of a crop, and its sign the flip.
    red = np.broadcast_to(np.arange(256, dtype=np.uint8), (256, 256))
    image = Image.fromarray(np.stack([red, red.T, red * 0], axis=-1))
    crop = FlippedCrop(32)
    views = torch.stack([crop(image, random.Random(seed)) for seed in range(300)])
    x, y = views[:, 0].mean(dim=1) * 0.229 * 255, views[:, 1].mean(dim=2) * 0.224 * 255
    width, height = (x[:, 24] - x[:, 8]) * 2, (y[:, 24] - y[:, 8]) * 2
    assert 0.4 < (width < 0).float().mean() < 0.6
    assert (height > 0).all()
    area = width.abs() * height / 256**2
    assert 0.075 < area.min() < 0.12
    assert 0.9 < area.max() < 1.01


def everything(root):
    """What protocols compute, from extraction to predictions."""
    encoder = tiny_encoder()
    encoder.model.to(device())
    plain = features_of(Extraction(encoder, "folder", root, 16, device(), batch_size=3))
    stored = features_of(Extraction(encoder, "folder", root, 16, device(), batch_size=3, cache=root / "features"))
    train, val = stored("train"), plain("val")
    schedule = Schedule((0.1, 1.0), epochs=3, batch_size=7)  # last batches are smaller than the number of ranks
    rows = np.delete(np.arange(20), [9, 11, 19, 18, 17])
    epochs = augmented_epochs(encoder, load_images("folder", "train", data=root), rows, ["cls"], schedule)
    stack = train_probes(epochs, {"cls": 8}, 5, schedule)["cls"]
    patches = stored_epochs({"patches": plain("train", "patches")}, np.arange(15), schedule)
    attentive = train_attentive_probes(patches, 3, 8, 5, 2, schedule, (0.1,))
    evaluation = Evaluation(None, {"train": train, "val": val}.__getitem__, "val", None, None, root)
    clusters = [metric.value for metric in clustering(evaluation, ClusteringOptions(seeds=3))]
    return {
        "train": torch.from_numpy(np.array(train.x)),
        "labels": torch.from_numpy(train.labels),
        "val": torch.from_numpy(val.x),
        "knn": torch.from_numpy(predict_knn(train, val, (3,), rows=4)[3]),
        "density": torch.from_numpy(fit_scores(train, None, num_components=2)(val.x)["mixture_density"]),
        "weights": torch.stack([layer.weight.detach().cpu() for layer in stack.layers]),
        "linear": torch.from_numpy(predict_linear(stack, val.x, rows=4)),
        "attentive": torch.stack([probe.classifier.weight.detach().cpu() for probe in attentive.probes]),
        "clusters": torch.tensor(clusters),
    }


def on_a_rank(rank):
    root = Path(os.environ["VIT_SSL_TEST_FOLDER"])
    return everything(root)


@pytest.mark.slow
def test_two_ranks_give_what_one_gives(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "one")
    alone = everything(root)
    monkeypatch.setenv("VIT_SSL_TEST_FOLDER", str(make_folder(tmp_path / "two")))
    for found in run_on_ranks(on_a_rank, 2):
        for name, value in alone.items():
            torch.testing.assert_close(
                found[name], value, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert (alone["weights"][0] - alone["weights"][1]).abs().max() > 0.01
    (folder,) = (tmp_path / "two/features").iterdir()
    assert folder.name.startswith("train-cls-")
