"""evaluate.py compare: every model on the same images, differences paired by image, and what they allow to say."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from config.recipe import load_recipe
from data.source.kept import Source, keep_source
from evaluators.request import ExtractOptions, Request, open_evaluation
from methods.registry import build_method
from reporting.own_tables import difference_row, own_tables
from reporting.several_runs.compare import Comparing, compare
from reporting.several_runs.comparison import Difference, Model, differences, sentence, table
from training.run import save_checkpoint

TINY = {
    **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "local_size": 8},
    **{"patch_size": 8, "out_dim": 12, "hidden_dim": 16, "bottleneck_dim": 8, "num_workers": 0, "dataset": "folder"},
}


def models(*pretrained):
    """Two baselines and models that are right on the images of these numbers, of 200."""
    right = {"raw pixels": range(150), "a random network": range(60, 190)} | dict(pretrained)
    known = ("raw pixels", "a random network")
    return [Model(name, {"knn": np.isin(np.arange(200), list(of))}, name not in known) for name, of in right.items()]


def test_the_standard_error_is_that_of_mcnemars_pairs():
    found = differences(models(("ours", range(100, 200))))
    assert [(d.a, d.b) for d in found] == [("ours", "raw pixels"), ("ours", "a random network")]
    only_ours, only_theirs, n = 50, 100, 200  # right on 150 ... 199 alone; wrong on 0 ... 99 alone
    mean = (only_ours - only_theirs) / n
    variance = (only_ours + only_theirs - n * mean**2) / (n - 1)
    assert found[0].value == pytest.approx(mean)
    assert found[0].error == pytest.approx(math.sqrt(variance / n))


def test_what_is_said():
    assert sentence(Difference("runs/mine", "raw pixels", "knn", -0.14, 0.006)) == (
        "raw pixels beat runs/mine by 14.0 ± 0.6 points (kNN)"
    )
    assert sentence(Difference("mine", "raw pixels", "linear", 0.031, 0.01)) == (
        "mine beats raw pixels by 3.1 ± 1.0 points (linear probe)"
    )
    assert sentence(Difference("mine", "a random network", "knn", -0.029, 0.01)) == (
        "mine and a random network cannot be told apart: −2.9 ± 1.0 points (kNN)"
    )
    assert sentence(Difference("mine", "yours", "knn", 0.0, 0.0)) == "mine and yours are right on the same images (kNN)"


def test_the_table_has_every_difference_once():
    assert table(models(("one", range(100)), ("two", range(20, 120)))) == [
        ["", "kNN, %", "minus raw pixels", "minus a random network", "minus one"],
        ["raw pixels", "75.0 ± 3.1", "", "", ""],
        ["a random network", "65.0 ± 3.4", "−10.0 ± 5.0", "", ""],
        ["one", "50.0 ± 3.5", "−25.0 ± 3.1", "−15.0 ± 6.0", ""],
        ["two", "50.0 ± 3.5", "−25.0 ± 3.1", "−15.0 ± 5.1", "+0.0 ± 3.2"],
    ]
    (row,) = [difference_row(d) for d in differences(models(("one", range(100)))) if d.b == "raw pixels"]
    assert row[:2] == ("knn minus raw pixels", -0.25)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of one architecture, one of them untrained, and one of another, on images whose mean tells the class."""
    root = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    for split, count in [("train", 12), ("val", 8)]:
        for number, name in enumerate(["dark", "light"]):
            (root / "images" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 200, (16, 16, 3)) + 25 * number
                Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / split / name / f"{index}.png")
    for name, changes in {"first": {}, "second": {}, "wide": {"hidden_size": 32}}.items():
        recipe = load_recipe("photos_dino_vmf", TINY | changes)
        method = build_method(recipe)
        if name == "second":
            with torch.no_grad():
                method.teacher.backbone.embeddings.patch_embeddings.projection.weight.zero_()  # sees nothing
        (root / name).mkdir()
        save_checkpoint(root / name, {"recipe": recipe, "method": method.state_dict(), "step": 1, "epoch": 0})
        keep_source(root / name, Source(root / "images"))
    return root


def test_runs_are_compared_on_the_images_that_they_know(runs, tmp_path, capsys):
    for name in ("first", "second", "wide"):
        shutil.copytree(runs / name, tmp_path / name)
    where = [str(tmp_path / name) for name in ("first", "second", "wide")]
    evaluate.main(["compare", *where, "--protocols", "knn", "--extract.num-workers", "0", "--extract.no-cache"])
    printed = capsys.readouterr().out
    assert (tmp_path / "first" / "compare.md").read_text().strip() in printed
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    names = [line.split("|")[1].strip() for line in lines[2:]]
    assert names == ["raw pixels", "a random network", "a random network like wide", "first", "second", "wide"]
    assert "- first and a random network are right on the same images (kNN)" in printed  # it is that network
    rows = [json.loads(line) for line in (tmp_path / "second" / "results.jsonl").read_text().splitlines()]
    kept = {row["metric"]: row for row in rows if row["protocol"] == "compare"}
    assert set(kept) == {f"knn minus {name}" for name in names[:4]}
    assert {row["n"] for row in rows} == {16}
    # The paired numbers from the predictions that the two evaluations left.
    labels = np.repeat([0, 1], 8)
    right = {
        name: np.load(tmp_path / folder / "predictions" / f"knn-{features}-val.npy") == labels
        for name, folder, features in [("pixels", "first", "pixels"), ("second", "second", "teacher")]
    }
    gain = right["second"].astype(int) - right["pixels"]
    assert kept["knn minus raw pixels"]["value"] == pytest.approx(gain.mean())
    assert kept["knn minus raw pixels"]["se"] == pytest.approx(np.sqrt(gain.var(ddof=1) / 16))
    page = (tmp_path / "first" / "evaluation.md").read_text()
    assert "## Accuracy on 16 val images of images\n\n|  | kNN, % |" in page
    assert (
        page.index("| raw pixels |") < page.index("| this model |") < page.index("This model and a random network are")
    )
    assert "Table" not in page


def test_a_run_knows_its_images_unless_they_are_gone(runs, tmp_path):
    found = open_evaluation(Request(str(runs / "first")))
    assert (found.dataset, found.data) == ("folder", runs / "images")
    shutil.copytree(runs / "first", tmp_path / "first")
    keep_source(tmp_path / "first", Source(tmp_path / "gone"))
    assert open_evaluation(Request(str(tmp_path / "first"))).dataset is None  # its prototypes can still be evaluated


def test_what_cannot_be_compared_is_refused(runs, tmp_path):
    first, second = str(runs / "first"), str(runs / "second")
    with pytest.raises(ValueError, match=r"`runs` \(=\(\)\) must be different ones, at least one"):
        compare(Comparing(()))
    with pytest.raises(ValueError, match=r"`runs` .* must be different ones"):
        compare(Comparing((first, first)))
    shutil.copytree(runs / "second", tmp_path / "second")
    other = tmp_path / "images"
    shutil.copytree(runs / "images", other)
    (other / "val" / "dark" / "0.png").unlink()
    keep_source(tmp_path / "second", Source(other))
    quick, two = ExtractOptions(num_workers=0, cache=False), (second, str(tmp_path / "second"))
    with pytest.raises(ValueError, match=r"`runs` .* must be of the same images: name them with --data"):
        compare(Comparing(two, protocols=("knn",), output=tmp_path / "out", extract=quick))


def test_a_page_leads_with_what_was_measured():
    common = {"features": "teacher", "split": "test", "data": "/x/mine", "n": 400}
    rows = [
        common | {"protocol": "knn", "metric": "top1", "value": 0.5},
        common | {"protocol": "knn", "metric": "top1", "value": 0.64, "features": "pixels"},
        common | {"protocol": "fewshot", "metric": "5-shot", "value": 0.4, "sd": 0.02},
        common | {"protocol": "prototypes", "metric": "prototypes", "value": 128, "split": "train"},
        common | {"protocol": "prototypes", "metric": "used_targets", "value": 110, "split": "train"},
    ]
    accuracy, prototypes = own_tables(rows, "runs/mine")
    assert accuracy.title == "Accuracy on 400 test images of mine"
    assert accuracy.lines == [
        ["", "kNN, %", "5 labels a class, %"],
        ["raw pixels", "64.0 ± 2.4", "–"],
        ["this model", "50.0 ± 2.5", "40.0 ± 2.0"],
    ]
    assert accuracy.notes == ["Whether it is better than raw pixels: `evaluate.py compare runs/mine`."]
    assert prototypes.lines[1] == ["are the target of some train image", "110 of 128"]
    name, value, options = difference_row(Difference("mine", "raw pixels", "knn", -0.14, 0.006))
    compared = common | {"protocol": "compare", "metric": name, "value": value} | options
    assert own_tables([*rows, compared], "runs/mine")[0].notes == [
        "Raw pixels beat this model by 14.0 ± 0.6 points (kNN)."
    ]
