"""evaluate.py on a saved run: what it feeds the protocols, what it writes, what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTModel

import evaluate
from config.recipe import load_recipe
from data.augment import EvalTransform
from data.images import load_images
from evaluators.features.extraction import extract
from evaluators.few_shot.few_shot import FewShotOptions
from evaluators.linear.linear import LinearOptions
from evaluators.ood.ood import OodOptions
from evaluators.protocol import NotApplicable
from evaluators.registry import PROTOCOLS
from evaluators.request import ExtractOptions, Request, make_features, open_evaluation
from methods.backbone import cls_token
from methods.registry import build_method
from reporting.rows import print_table
from training.run import load_run, random_backbone, save_checkpoint

TINY = {
    **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "local_size": 8},
    **{"patch_size": 8, "out_dim": 12, "hidden_dim": 16, "bottleneck_dim": 8, "num_workers": 0},
}
FEW = {"fewshot": FewShotOptions(draws=3)}
SCORES_OF_FEATURES = ("mixture_density", "mixture_kappa", "knn", "mahalanobis", "msp")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a run whose teacher is not its first weights."""
    directory = tmp_path_factory.mktemp("run")
    recipe = load_recipe("photos_dino_vmf", TINY)
    method = build_method(recipe)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in method.teacher.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_checkpoint(directory, {"recipe": recipe, "method": method.state_dict(), "step": 5, "epoch": recipe.epochs})
    return directory


@pytest.fixture
def run_directory(trained, tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "checkpoint.pt").symlink_to(trained / "checkpoint.pt")
    return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in [("train", 13), ("val", 6), ("test", 7)]:
        for number, name in enumerate(["dark", "light", "red"]):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 120, (20, 24, 3)) + [[0, 0, 0], [3, 3, 3], [9, 0, 0]][number]
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{index}.png")
    return root  # hard to tell apart, so that accuracies are neither 0 nor 1


def written(directory):
    return [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]


def request(checkpoint, **options):
    return Request(str(checkpoint), **options)


def test_all_protocols_are_appended_and_printed(run_directory, folder, capsys):
    rows = evaluate.evaluate_all(request(run_directory, split="test", data=folder), FEW)
    assert written(run_directory) == rows
    metrics = [(row["protocol"], row["metric"]) for row in rows]
    shots = [("fewshot", f"{shot}-shot") for shot in (1, 2, 5)]
    assert metrics[:5] == [("knn", "top1"), ("linear", "top1"), *shots]
    prototype_metrics = [metric for protocol, metric in metrics[5:] if protocol == "prototypes"]
    kappas = ["kappa_min", "kappa_p05", "kappa_p50", "kappa_p95", "kappa_max"]
    assert {"prototypes", "used_scores", "used_targets", *kappas, "unique"} <= set(prototype_metrics)
    for row in rows:
        assert (row["features"], row["data"], row["checkpoint"]) == ("teacher", str(folder), str(run_directory))
        assert row["seconds"] >= 0
        assert row["date"].endswith("+00:00")
        if row["protocol"] != "prototypes":
            assert (row["split"], row["n"]) == ("test", 21)
            assert (-0.5 if row["metric"].startswith("ari") else 0) <= row["value"] <= 1
    by_metric = {row["metric"]: row for row in rows if row["protocol"] == "prototypes"}
    assert (by_metric["used_scores"]["split"], by_metric["used_scores"]["n"]) == ("train", 39)
    assert rows[0]["k"] in (5, 10, 20, 50)
    printed = capsys.readouterr().out
    assert "retrieval is left out: it needs a folder of its own, --retrieval-data" in printed
    table = printed[printed.index("protocol ") :].splitlines()
    assert len(table) == 2 + len(rows)
    assert table[0].split() == ["protocol", "features", "split", "metric", "value"]
    assert table[1].split()[:5] == ["knn", "teacher", "test", "top1", f"{rows[0]['value']:.3f}"]
    assert table[-1] == f"Page: {run_directory / 'evaluation.html'}"
    assert written(run_directory) + evaluate.evaluate(request(run_directory, data=folder), "knn") == written(
        run_directory
    )


def test_columns_are_as_wide_as_their_longest_metric(capsys):
    row = {"protocol": "retrieval", "features": "teacher", "split": "test", "metric": "roxford5k_medium_mP@10"}
    print_table(iter([row | {"value": 0.5}, row | {"metric": "top1", "value": 1}]))
    assert len({len(line) for line in capsys.readouterr().out.splitlines()}) == 1


def test_predictions_are_kept_for_paired_comparisons(run_directory, folder):
    labels = load_images("folder", "test", data=folder).labels
    where = request(run_directory, features="pixels", split="test", data=folder)
    for row in evaluate.evaluate(where, "knn") + evaluate.evaluate(where, "linear"):
        predicted = np.load(run_directory / "predictions" / f"{row['protocol']}-pixels-test.npy")
        assert row["value"] == pytest.approx(np.mean(predicted == labels))


def test_two_metrics_with_predictions_have_a_file_each(run_directory, folder):
    options = LinearOptions("sgd", lrs=(0.1,), epochs=1)
    first, second = evaluate.evaluate(request(run_directory, data=folder), "linear", options)
    labels = load_images("folder", "val", data=folder).labels
    for row, name in [(first, "linear-teacher-val"), (second, "linear-teacher-val-top1_D")]:
        predicted = np.load(run_directory / "predictions" / f"{name}.npy")
        assert row["value"] == pytest.approx(np.mean(predicted == labels))
    assert [(row["metric"], row["tokens"]) for row in (first, second)] == [("top1_C", "cls"), ("top1_D", "last4")]


def test_features_are_what_they_are_called(run_directory, folder):
    run = load_run(run_directory)
    images = [image for image, _ in load_images("folder", "val", data=folder)]
    batch = torch.stack([EvalTransform(16)(image) for image in images])
    with torch.no_grad():
        expected = {
            "teacher": cls_token(run.backbone, batch),
            "random": cls_token(random_backbone(run.recipe), batch),
            "pixels": batch.reshape(18, -1),
        }
    for name, x in expected.items():
        evaluation = open_evaluation(request(run_directory, features=name, data=folder))
        found = evaluation.features("val")
        assert np.allclose(found.x, x.numpy(), atol=1e-5)
        assert found.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
        assert found.classes == ["dark", "light", "red"]
        assert (evaluation.run is None) == (name != "teacher")
        assert (evaluation.encoder is None) == (name == "pixels")
    assert not np.allclose(expected["teacher"], expected["random"], atol=1e-2)


def test_the_runs_own_data_is_used_whole(run_directory):
    found = make_features(load_run(run_directory), "pixels")("val")
    image = load_images("photos", "val")[7][0]
    assert len(found.labels) == len(load_images("photos", "val"))
    assert np.array_equal(found.x[7], EvalTransform(16)(image).flatten().numpy())
    assert not (run_directory / "features").exists()


def test_every_split_is_extracted_once_and_for_all(run_directory, folder, monkeypatch):
    extracted = []

    def watched(encode, images, *arguments, **options):
        extracted.append(images.split)
        return extract(encode, images, *arguments, **options)

    monkeypatch.setattr("evaluators.features.extraction.extract", watched)
    evaluate.evaluate(request(run_directory, split="test", data=folder), "knn")
    assert sorted(extracted) == ["test", "train", "val"]
    evaluate.evaluate(request(run_directory, split="test", data=folder), "fewshot", FEW["fewshot"])
    assert len(extracted) == 3
    uncached = request(run_directory, data=folder, extract=ExtractOptions(cache=False))
    evaluate.evaluate(uncached, "knn")
    assert len(extracted) == 5


def test_only_the_teacher_has_prototypes(run_directory, folder):
    where = request(run_directory, features="random", data=folder)
    rows = evaluate.evaluate_all(where, FEW)
    assert list(dict.fromkeys(row["protocol"] for row in rows)) == ["knn", "linear", "fewshot", "clustering"]
    with pytest.raises(NotApplicable, match="prototypes are in the head, and this checkpoint is a backbone alone"):
        evaluate.evaluate(where, "prototypes")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported")
    config = ViTConfig(
        **{"image_size": 16, "patch_size": 8, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2},
        intermediate_size=16,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(directory)
    return directory


def test_other_checkpoints_say_where_results_go_and_what_they_are_of(exported, folder, tmp_path):
    with pytest.raises(ValueError, match=r"`output` \(=None\) must be a folder for the results"):
        evaluate.evaluate(request(exported, data=folder), "knn")
    with pytest.raises(NotApplicable, match="give --data DIR, or --dataset NAME"):
        evaluate.evaluate(request(exported, output=tmp_path), "knn")
    rows = evaluate.evaluate_all(request(exported, data=folder, output=tmp_path / "new"), FEW)
    assert list(dict.fromkeys(row["protocol"] for row in rows)) == ["knn", "linear", "fewshot", "clustering"]
    assert written(tmp_path / "new") == rows
    assert (tmp_path / "new/evaluation.md").is_file()
    (row,) = evaluate.evaluate(request(exported, dataset="digits", output=tmp_path / "new"), "knn")
    assert (row["data"], row["n"]) == ("digits", 360)
    evaluation = open_evaluation(request(exported, data=folder, output=tmp_path, extract=ExtractOptions(image_size=24)))
    assert evaluation.encoder.image_size == 24
    with pytest.raises(ValueError, match=r"`image_size` \(=20\) must be a multiple of the patch size, 8"):
        open_evaluation(request(exported, data=folder, output=tmp_path, extract=ExtractOptions(image_size=20)))


@pytest.mark.parametrize(
    ("own", "data", "named", "expected"),
    [
        ("photos", None, None, "photos"),
        ("photos", "some", None, "folder"),
        ("folder", None, None, None),  # its folder is not known here
        ("stream", "uoft-cs/cifar10", None, "hub"),
        ("hub", "some", "folder", "folder"),
    ],
)
def test_which_images(own, data, named, expected, trained, tmp_path):
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    state["recipe"]["dataset"] = own
    torch.save(state, tmp_path / "checkpoint.pt")
    data = None if data is None else Path(data)
    assert open_evaluation(request(tmp_path, data=data, dataset=named)).dataset == expected


def test_all_goes_on_where_a_protocol_does_not_apply(run_directory, folder, capsys):
    many = {"fewshot": FewShotOptions(shots=(14,))}
    rows = evaluate.evaluate_all(request(run_directory, data=folder), many)
    assert list(dict.fromkeys(row["protocol"] for row in rows)) == ["knn", "linear", "prototypes", "clustering"]
    assert "fewshot is left out: class 'dark' has 13 train images, but 14-shot" in capsys.readouterr().out


def test_bad_input_writes_nothing(run_directory, tmp_path):
    with pytest.raises(ValueError, match=r"`paper_row` \(='ViT-Z'\) must be one of "):
        evaluate.evaluate_all(request(run_directory), paper_row="ViT-Z")
    with pytest.raises(FileNotFoundError, match=r"holds neither checkpoint\.pt nor config\.json"):
        evaluate.evaluate(request(tmp_path), "knn")
    (tmp_path / "images/cat").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "images/cat/a.png")
    with pytest.raises(FileNotFoundError, match="there is no 'val' split: expected PATH/"):
        evaluate.evaluate(request(run_directory, data=tmp_path / "images"), "knn")
    assert not (run_directory / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"key": "student"}, r"`key` \(='student'\) is only for .pth files, which .* is not"),
        ({"heads": 3}, r"`heads` \(=3\) is only for .pth files"),
        ({"extract": ExtractOptions(batch_size=0)}, r"`batch_size` \(=0\) must be at least 1"),
        ({"extract": ExtractOptions(num_workers=-1)}, r"`num_workers` \(=-1\) must be at least 0"),
        ({"extract": ExtractOptions(image_size=-8)}, r"`image_size` \(=-8\) must be at least 1"),
    ],
)
def test_absurd_requests_are_refused(run_directory, settings, message):
    with pytest.raises(ValueError, match=message):
        open_evaluation(request(run_directory, **settings))


def test_absurd_options_are_refused_before_anything_runs(run_directory, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`video_data` \(='.*nowhere'\) must be a folder"):
        evaluate.evaluate_all(request(run_directory), folders={"video": tmp_path / "nowhere"})
    with pytest.raises(ValueError, match=r"`regularization` \(=inf\) must be finite"):
        evaluate.evaluate_all(request(run_directory), {"fewshot": FewShotOptions(regularization=float("inf"))})
    with pytest.raises(ValueError, match=r"`lrs` \(=\(1.0, nan\)\) must be finite"):
        evaluate.evaluate(request(run_directory), "linear", LinearOptions(lrs=(1.0, float("nan"))))
    assert not (run_directory / "results.jsonl").exists()


def test_command_line(run_directory, folder, capsys):
    where = ["--checkpoint", str(run_directory), "--split", "test", "--data", str(folder)]
    evaluate.main(["knn", *where, "--features", "pixels", "--ks", "3", "7"])
    (row,) = written(run_directory)
    assert (row["features"], row["split"], list(row["val_top1_by_k"])) == ("pixels", "test", ["3", "7"])
    evaluate.main(["all", *where, "--features", "random", "--knn.ks", "2", "--fewshot.shots", "1"])
    metrics = [(row["protocol"], row["metric"], row.get("k")) for row in written(run_directory)[1:4]]
    assert metrics == [("knn", "top1", 2), ("linear", "top1", None), ("fewshot", "1-shot", None)]
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["detection", *where])
    assert "detection" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*PROTOCOLS, "all"])
def test_every_protocol_has_a_command(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        evaluate.main([name, "--help"])
    assert "--checkpoint" in capsys.readouterr().out


def test_other_images_are_told_from_those_of_the_data(run_directory, folder, tmp_path):
    (tmp_path / "other").symlink_to(folder / "val")  # class folders alone, without splits
    where = ["--checkpoint", str(run_directory), "--split", "test", "--data", str(folder), "--components", "1"]
    evaluate.main(["ood", *where, "--near", f"same={folder}", "--far", "digits", "--out", str(tmp_path / "other")])
    rows = {row["metric"]: row for row in written(run_directory)}
    scores = ("head_density", "head_kappa", "head_responsibility", *SCORES_OF_FEATURES)
    assert [name for name in rows if name.startswith("auroc") and name.endswith("@digits")] == [
        f"auroc_{score}@digits" for score in scores
    ]
    assert all(0 <= row["value"] <= 1 for name, row in rows.items() if not name.startswith("difficulty"))
    # The same folder is cropped as the data are, and its images are the same ones.
    assert all(rows[f"auroc_{score}@same"]["value"] == 0.5 for score in scores)
    assert rows["auroc_knn@digits"]["n_out"] == 360
    assert (rows["auroc_knn@other"]["n_out"], rows["auroc_knn@other"]["n"]) == (18, 21)
    evaluate.main(["page", str(run_directory)])
    page = (run_directory / "evaluation.md").read_text()
    section = page.partition("## Out of distribution")[2].partition("\n## ")[0]
    assert "| AUROC, same (near) | FPR95, same (near) | AUROC, digits (far) |" in section
    assert "| AUROC, mean of near sets |" in section
    assert "| distance to the k-th nearest neighbour | " in section
    assert f"{100 * rows['auroc_knn@digits']['value']:.1f}" in section
    assert "rejected when 95 % of the others are" in section
    with pytest.raises(FileNotFoundError, match=r"`out` \(='nowhere'\) must be photos, digits, a folder or hub:NAME"):
        evaluate.evaluate(request(run_directory, data=folder), "ood", OodOptions(out=("nowhere",)))


def test_other_images_are_cropped_as_those_of_the_data(run_directory, folder, monkeypatch):
    """Sets of libraries are used whole, large folders are not: what is compared must differ in its images alone."""
    monkeypatch.setattr("data.images.WHOLE_BELOW", 0)  # as if the images were large
    inside = open_evaluation(request(run_directory))  # its own photographs
    x = inside.features_elsewhere("folder", folder)("test").x
    backbone = load_run(run_directory).backbone
    batch = torch.stack([EvalTransform(16)(image) for image, _ in load_images("folder", "test", data=folder)])
    with torch.no_grad():
        assert np.allclose(x, cls_token(backbone, batch).numpy(), atol=1e-5)
    alone = open_evaluation(request(run_directory, data=folder)).features("test").x
    assert not np.allclose(x, alone, atol=1e-3)


def section_of(directory, title):
    evaluate.main(["page", str(directory)])
    return (directory / "evaluation.md").read_text().partition(f"## {title}")[2].partition("\n## ")[0]


def test_clusters_of_a_run_beside_those_of_pixels(run_directory, folder):
    where = ["--checkpoint", str(run_directory), "--split", "test", "--data", str(folder)]
    evaluate.main(["clustering", *where, "--seeds", "2"])
    evaluate.main(["clustering", *where, "--seeds", "1", "--features", "pixels", "--clusters", "5"])
    rows = {(row["features"], row["metric"]): row for row in written(run_directory)}
    used = rows["teacher", "nmi_prototypes"]["clusters"]
    assert rows["teacher", "nmi_kmeans@prototypes"]["clusters"] == used > 1
    section = section_of(run_directory, "Clusters and classes, test images of images")
    lines = [line.split(" | ")[:2] for line in section.splitlines() if line.startswith("| ")][2:]
    assert lines == [
        ["| raw pixels, k-means", "3"],
        ["| raw pixels, k-means", "5"],
        ["| this model, its prototypes", str(used)],
        ["| this model, k-means", "3"],
        ["| this model, k-means", str(used)],
    ]
    assert f"| {100 * rows['pixels', 'nmi_kmeans@5']['value']:.1f} |" in section
    assert f" ± {100 * rows['teacher', 'ari_kmeans']['sd']:.1f} |" in section


@pytest.mark.parametrize("augment", [(), ("--augment",)])
def test_an_attentive_probe_from_the_command_line(run_directory, folder, augment):
    few = ["--epochs", "1", "--lrs", "0.01", "--weight-decays", "0", "0.1", *augment]
    evaluate.main(["attentive", "--checkpoint", str(run_directory), "--data", str(folder), *few])
    (row,) = written(run_directory)
    predicted = np.load(run_directory / "predictions" / "attentive-teacher-val.npy")
    labels = load_images("folder", "val", data=folder).labels
    assert (row["value"], row["n"]) == (pytest.approx(np.mean(predicted == labels)), 18)
    assert row["augmented"] == bool(augment)
    assert "| attentive probe, % |" in section_of(run_directory, "Accuracy on 18 val images of images")


@pytest.fixture(scope="module")
def shifted(folder, tmp_path_factory):
    """The test images in the layouts of ImageNet-V2, -A and -C: as they are, of two classes, and with noise."""
    root, rng = tmp_path_factory.mktemp("shifted"), np.random.default_rng(0)
    for number, name in enumerate(["dark", "light", "red"]):
        for path in sorted((folder / "test" / name).iterdir()):
            places = [f"V2/{number}", *([f"A/{name}"] if name != "dark" else []), f"C/noise/1/{name}"]
            for place in places:
                (root / place).mkdir(parents=True, exist_ok=True)
                (root / place / path.name).symlink_to(path)
            (root / f"C/noise/2/{name}").mkdir(parents=True, exist_ok=True)
            noise = np.asarray(Image.open(path)) + rng.normal(0, 200, (20, 24, 3))
            Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(root / f"C/noise/2/{name}" / path.name)
    return root


def test_one_probe_on_every_layout(run_directory, folder, shifted):
    where = ["--checkpoint", str(run_directory), "--split", "test", "--data", str(folder)]
    evaluate.main(["robustness", *where, "--sets", *(f"{name}={shifted / name}" for name in ("V2", "A", "C"))])
    rows = {row["metric"]: row for row in written(run_directory)}
    clean = rows["top1"]["value"]
    assert rows["top1@V2"]["value"] == clean
    assert rows["top1@A"]["value"] == rows["top1@A"]["clean"] > clean  # the same images, one wrong answer less
    assert (rows["top1@A"]["classes"], rows["top1@A"]["n"]) == (2, 14)
    severities = rows["top1@C/noise"]["by_severity"]
    assert severities["1"] == clean != severities["2"]
    assert rows["top1@C"]["value"] == rows["top1@C/noise"]["value"] == pytest.approx((clean + severities["2"]) / 2)
    section = section_of(run_directory, "Robustness, test images of images")
    assert f"| A | 2 | {100 * rows['top1@A']['value']:.1f} ± " in section
    assert "| C, noise | 3 | " in section


def test_corrupted_images_are_not_cropped(run_directory, folder, monkeypatch):
    monkeypatch.setattr("data.images.WHOLE_BELOW", 0)  # as if the images were large
    evaluation = open_evaluation(request(run_directory, data=folder))
    whole = evaluation.features_elsewhere("folder", folder, whole=True)("test").x
    batch = torch.stack([EvalTransform(16, keep=1.0)(image) for image, _ in load_images("folder", "test", data=folder)])
    with torch.no_grad():
        assert np.allclose(whole, cls_token(load_run(run_directory).backbone, batch).numpy(), atol=1e-5)
    assert not np.allclose(whole, evaluation.features("test").x, atol=1e-3)
