"""`python -m benchmarks ood`: the sets, what is measured, the table and the picture, and how it goes on."""

import dataclasses
import json
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from benchmarks import results
from benchmarks.fashion import data as fashion
from benchmarks.fashion.train import Settings
from benchmarks.ood import figures, images, networks, run, tables

from feature_blobs import blobs

TINY = Settings(steps=2, batch=8, prototypes=12, bottleneck=4, hidden=8, widths=(4, 4, 4), warmup=1)


def clothing(count: int) -> fashion.Images:
    """Grey images of ten classes; the values are those of bytes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 10
    pixels = torch.randint(0, 20, (count, 1, 28, 28), generator=generator) + 20 * labels[:, None, None, None]
    return fashion.Images((pixels / 255 - fashion.MEAN) / fashion.DEVIATION, labels)


SPLITS = {"train": clothing(60), "test": clothing(20)}


def test_a_picture_of_clothing_is_the_tensor_it_was_made_of():
    x = SPLITS["test"].x
    torch.testing.assert_close(images.as_tensors(images.as_pictures(x)), x)
    near = images.out_sets(images.CLOTHING, SPLITS)[images.UPSIDE_DOWN]
    torch.testing.assert_close(images.as_tensors(near), x.flip(2))


def test_every_network_sees_three_other_sets(monkeypatch):
    assert {inside: list(images.out_sets(inside, SPLITS)) for inside in images.NEAR} == {
        "photographs": ["other pictures", "digits", "Fashion-MNIST"],
        "Fashion-MNIST": ["upside down", "digits", "photographs"],
    }
    assert all(image.size == (32, 32) for image in images.other_pictures())
    monkeypatch.setattr(networks, "out_sets", lambda inside, clothing: {"x": images.as_pictures(SPLITS["test"].x[:3])})
    made = [networks.clothing_networks(lambda **options: dataclasses.replace(TINY, **options), arm, 0, SPLITS)
            for arm in run.ARMS]  # fmt: skip
    assert [seen.own is None for seen in made] == [False, False, True]
    for seen in made:
        assert seen.test.x.shape == (20, 64)
        np.testing.assert_allclose(seen.outside["x"], seen.test.x[:3], atol=1e-4)
    weights = [seen.own.mixture.weights for seen in made[:2]]
    assert np.ptp(weights[0].numpy()) < 1e-6 < np.ptp(weights[1].numpy()), "without log C_p they are not equal"


real = run.fit_scores


def seen(shift: float) -> networks.Seen:
    return networks.Seen(blobs(0), blobs(1, 40), {"a": blobs(2, 30).x + shift, "b": blobs(3, 30).x - 30}, None)


def test_the_command_goes_on_and_writes_a_table_and_a_picture(tmp_path, monkeypatch, capsys):
    made = []

    def network(runs, arm, seed, clothing):
        made.append((arm, seed))
        return seen(shift=3 + seed)

    monkeypatch.setattr(run, "photograph_networks", network)
    monkeypatch.setattr(run, "load", lambda folder: SPLITS)
    monkeypatch.setattr(run, "fit_scores", lambda train, own: real(train, own, num_components=1))
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(figures, "PICTURE", tmp_path / "picture.svg")
    monkeypatch.setattr("benchmarks.mixture_docs.update_docs", lambda: None)
    for seeds in ((0,), (0, 1)):
        run.ood(seeds=seeds, inside=("photographs",), output=tmp_path)
    assert made == [(arm, seed) for seed in (0, 1) for arm in run.ARMS]
    result = json.loads(next((tmp_path / "results").iterdir()).read_text())
    found = result["rows"][0]["scores"]
    assert list(found) == ["mixture_density", "mixture_kappa", "knn", "mahalanobis", "msp"]
    assert found["mahalanobis"]["auroc"]["b"] == 1.0
    assert found["knn"]["chosen"] == {"k": 50}
    assert result["rows"][0]["images"] == {"a": 30, "b": 30}
    text = tables.table(result)
    assert "**Pretrained on photographs**, 2 seeds:" in text
    assert text.count("\n| DINO-vMF | ") == 5
    values = 100 * np.array([row["scores"]["knn"]["auroc"]["a"] for row in result["rows"][::3]])
    assert f"neighbour | {values.mean():.1f} ± {values.std(ddof=1):.1f} (" in text
    assert ElementTree.parse(tmp_path / "picture.svg").getroot().tag.endswith("svg")
    with pytest.raises(ValueError, match=r"`inside` \(=\('digits',\)\) must be of photographs, Fashion-MNIST, which"):
        run.ood(inside=("digits",), output=tmp_path)


def test_every_score_has_a_short_name_for_the_picture():
    assert list(figures.SHORT) == list(tables.IN_WORDS)
