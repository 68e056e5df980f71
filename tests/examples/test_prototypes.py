"""The prototypes' protocol: worked by hand, on a .pth file with a head, kNN by kappa, tables and charts."""

import csv
import math
import tempfile
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from evaluators.protocol import Evaluation, Features, NotApplicable
from evaluators.prototypes.choices import by_kappa
from evaluators.prototypes.components import open_components, read_head
from evaluators.prototypes.prototypes import PrototypesOptions, prototypes
from gloo import run_on_ranks
from reporting.prototype_charts import draw_chart, draw_charts
from vmf_heads import VMFPrototypeHead, log_vmf_normalizer


def evaluation(output: Path, *, run=None, source: str = "", features=None, split: str = "val") -> Evaluation:
    encoder = types.SimpleNamespace(source=source, key="teacher", model=types.SimpleNamespace(device="cpu"))
    return Evaluation(encoder, features, split, None, run, output, dataset="photos" if features else None)


def read_rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def run_of(weight: torch.Tensor, *, temperature: float = 0.1, normalizer: str = "none"):
    """A run whose backbone features are y already, with a centre that forbids prototype 1 as a target."""
    total, dim = weight.shape
    head = VMFPrototypeHead(dim, total, nlayers=1, bottleneck_dim=dim, mlp_bias=False, normalizer=normalizer)
    head.requires_grad_(False)
    head.mlp.weight.copy_(torch.eye(dim))
    head.last_layer.weight_g.copy_(-weight.norm(dim=1, keepdim=True))  # a sign must not matter
    head.last_layer.weight_v.copy_(-weight)
    epochs = []

    def targets(scores, epoch):
        epochs.append(epoch)
        return (scores - 9.0 * (torch.arange(total) == 1)).softmax(dim=1)

    method = types.SimpleNamespace(prototypes=lambda: head.last_layer, targets=targets, epochs=epochs)
    recipe = types.SimpleNamespace(student_temp=temperature, epochs=10)
    return types.SimpleNamespace(head=head, method=method, recipe=recipe, epoch=10)


WEIGHT = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 3.0], [-1.0, 0.0], [-2.0, -2.2]])
TRAIN = Features(
    np.array([[2, 0], [0.9, 0.1], [0, 1], [0.1, 0.9], [1, 0.01]], np.float32), np.arange(5) % 2, ["a", "b"]
)
VAL = Features(np.array([[1, 0.1], [0.1, 1], [0.2, 1]], np.float32), np.array([0, 0, 0]), ["a", "b"])


def test_a_run_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluators.prototypes.choices.CHUNK_ELEMENTS", 2 * len(WEIGHT))
    run = run_of(WEIGHT)
    options = PrototypesOptions(thresholds=(0.5,), k=1, ranges=2, void=0.9)
    found = evaluation(tmp_path, run=run, features={"train": TRAIN, "val": VAL}.__getitem__)
    metrics = {metric.name: metric for metric in prototypes(found, options)}
    value = {name: metric.value for name, metric in metrics.items()}
    assert value["prototypes"] == 5
    assert value["used_scores"] == value["used_logits"] == 2  # prototypes 1 and 2
    assert value["used_targets"] == 2  # 0 and 2
    norms = 10 * np.array([1.0, math.hypot(2, 0.1), 3.0, 1.0, math.hypot(2, 2.2)])
    for name, quantile in [("min", 0), ("p05", 0.05), ("p50", 0.5), ("p95", 0.95), ("max", 1)]:
        assert value[f"kappa_{name}"] == pytest.approx(np.quantile(norms, quantile), rel=1e-6)
    assert (value["unique"], value["largest_set"]) == (4, 2)  # 1 repeats 0
    assert (value["unique@0.5"], value["largest_set@0.5"]) == (3, 2)  # and 4 repeats 3: cosine 0.67
    assert metrics["unique@0.5"].options == {"n": 5, "cosine": 0.5}
    y = TRAIN.x / np.linalg.norm(TRAIN.x, axis=1, keepdims=True)
    mean = y.mean(axis=0)
    assert value["mean_length"] == pytest.approx(np.linalg.norm(mean))
    opposite = -(WEIGHT.numpy() @ mean) / np.linalg.norm(mean) / (norms / 10)
    assert (opposite > 0.9).tolist() == [False, False, False, False, True]
    assert value["void"] == 1
    targets = np.exp(y @ WEIGHT.numpy().T - 9 * (np.arange(5) == 1))
    targets /= targets.sum(axis=1, keepdims=True)
    assert value["target_entropy"] == pytest.approx(-(targets * np.log(targets)).sum() / 5, rel=1e-5)
    assert value["marginal_entropy"] == pytest.approx(
        -(targets.mean(axis=0) * np.log(targets.mean(axis=0))).sum(), rel=1e-5
    )
    assert set(run.method.epochs) == {9}  # the last epoch there is a teacher temperature for
    # Val image 0 is of prototype 1 and nearest to a train image of class b; the others are of prototype 2, kappa 30.
    low, high = metrics["top1@kappa_0-50"], metrics["top1@kappa_50-100"]
    assert (low.value, low.options["n"], low.options["kappa_low"]) == (0.0, 1, pytest.approx(norms[1]))
    assert (high.value, high.options["n"], high.options["kappa_high"]) == (0.0, 2, pytest.approx(30.0))
    assert low.options["split"] == "val"


def numbers_of(rank: int) -> dict[str, float]:
    """What a rank yields, and how many tables it writes to a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        found = evaluation(Path(folder), run=run_of(WEIGHT), features={"train": TRAIN, "val": VAL}.__getitem__)
        metrics = {metric.name: metric.value for metric in prototypes(found, PrototypesOptions(k=1))}
        return metrics | {"tables": len(list(Path(folder).rglob("*.csv")))}


@pytest.mark.slow
def test_of_two_ranks_the_first_has_the_numbers_of_one():
    alone, (first, second) = numbers_of(0), run_on_ranks(numbers_of)
    assert alone["tables"] == 3
    assert first == alone
    assert second == {"tables": 0}


def test_vmf_logits_decide_the_component(tmp_path):
    """Along e_0 the longer prototype has the larger score, but its log C_p makes the shorter one the more probable."""
    weight = torch.tensor([[1.5, 0.0], [1.0, 0.0]])
    y = Features(np.array([[1, 0.9], [1, 1]], np.float32), np.zeros(2, int), ["a"])
    value = {}
    for normalizer in ("none", "vmf"):
        run = run_of(weight, normalizer=normalizer)
        found = evaluation(tmp_path / normalizer, run=run, features=lambda split: y)
        for metric in prototypes(found, PrototypesOptions(images=1)):
            value[normalizer, metric.name] = metric.value
        logits = 10 * weight.double() @ torch.tensor([1.0, 0.9]).double() / math.hypot(1, 0.9)
        logits += log_vmf_normalizer(weight.norm(dim=1).double() * 10, 2) * (normalizer == "vmf")
        table = read_rows(tmp_path / normalizer / "prototypes/prototypes.csv")
        assert [int(row["images_by_logits"]) for row in table] == [int(k == logits.argmax()) for k in range(2)]
    assert logits.argmax() == 1
    assert not any(name.startswith("top1") for _, name in value)  # one component has all images


@pytest.mark.parametrize(("ranges", "sizes"), [(1, [8]), (2, [5, 3]), (4, [2, 3, 1, 2]), (8, [1, 1, 3, 1, 2])])
def test_kappa_ranges_keep_equal_values_together(ranges, sizes):
    kappa = np.array([5.0, 3.0, 3.0, 9.0, 1.0, 9.0, 3.0, 2.0])
    correct = np.array([1, 1, 0, 0, 1, 1, 1, 0], bool)
    rows = list(by_kappa(kappa, correct, ranges))
    assert [row["n"] for row in rows] == sizes
    for row in rows:
        inside = (kappa >= row["kappa_low"]) & (kappa <= row["kappa_high"])
        top1 = correct[inside].mean()
        assert (row["n"], row["top1"]) == (inside.sum(), top1)
        assert row["standard_error"] == pytest.approx(math.sqrt(top1 * (1 - top1) / inside.sum()))
    assert list(by_kappa(np.full(8, 10.0), correct, ranges)) == []


def test_tables_and_charts_show_the_numbers(tmp_path):
    found = evaluation(tmp_path, run=run_of(WEIGHT), features={"train": TRAIN, "val": VAL}.__getitem__)
    value = {metric.name: metric.value for metric in prototypes(found, PrototypesOptions(k=1))}
    folder = tmp_path / "prototypes"
    duplicates = read_rows(folder / "duplicates.csv")
    assert [float(row["cosine"]) for row in duplicates] == list(PrototypesOptions().thresholds)
    assert [int(row["unique"]) for row in duplicates if row["cosine"] == "0.9"] == [value["unique"]]
    table = read_rows(folder / "prototypes.csv")
    assert sum(int(row["images_by_scores"]) > 0 for row in table) == value["used_scores"]
    assert sum(int(row["images_by_targets"]) for row in table) == 5
    assert len(read_rows(folder / "knn_by_kappa.csv")) == 2
    draw_charts(folder)
    for name in ("duplicates", "void", "knn_by_kappa"):
        light = (folder / f"{name}.svg").read_text()
        assert ElementTree.fromstring(light).tag.endswith("svg")
        assert light == draw_chart(folder, name) != draw_chart(folder, name, dark=True)
    assert draw_chart(tmp_path, "void") == ""


class WeightNormHead(nn.Module):
    """The head of facebookresearch/dino, as its checkpoints know it."""

    def __init__(self, dim, hidden, bottleneck, total, use_bn):
        super().__init__()
        norms = [nn.BatchNorm1d(hidden)] if use_bn else []
        layers = [nn.Linear(dim, hidden), *norms, nn.GELU(), nn.Linear(hidden, hidden), *norms, nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        self.last_layer = nn.utils.parametrizations.weight_norm(nn.Linear(bottleneck, total, bias=False))

    def forward(self, x):
        return self.last_layer(nn.functional.normalize(self.mlp(x), dim=-1))

    def old_names(self):
        new = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
        state = self.state_dict()
        return {name.replace(old, new[old]) if (old := next((o for o in new if o in name), "")) else name: state[name]
                for name in state}  # fmt: skip


@pytest.mark.parametrize("use_bn", [False, True])
def test_the_head_of_an_original_checkpoint(tmp_path, use_bn):
    torch.manual_seed(0)
    original = WeightNormHead(6, 8, 4, 30, use_bn).eval()
    state = {f"module.head.{name}": value for name, value in original.old_names().items()}
    torch.save({"teacher": state | {"module.backbone.cls_token": torch.zeros(1, 1, 6)}}, tmp_path / "full.pth")
    x = torch.randn(50, 6)
    found = evaluation(tmp_path, source=str(tmp_path / "full.pth"))
    components = open_components(found, normalizer="vmf", temperature=0.2)
    with torch.no_grad():
        scores = components.project(x) @ components.prototypes.T
        torch.testing.assert_close(scores, original(x))
    norms = original.last_layer.weight.detach().norm(dim=1)
    log_c = log_vmf_normalizer(torch.cat([norms, torch.ones(1)]).double() / 0.2, 4)
    torch.testing.assert_close(components.log_normalizer.double(), log_c[:-1] - log_c[-1], rtol=1e-5, atol=1e-5)
    # Without images the prototypes alone are counted.
    metrics = list(prototypes(found, PrototypesOptions()))
    assert {metric.options["split"] for metric in metrics} == {""}
    value = {metric.name: metric.value for metric in metrics}
    assert value["prototypes"] == 30
    assert value["kappa_max"] == pytest.approx(10 * norms.max().item())
    assert {"unique", "largest_set", "unique@0.5"} < set(value)
    assert not {"used_scores", "void"} & set(value)


def test_what_has_no_prototypes(tmp_path):
    with pytest.raises(NotApplicable, match="this checkpoint is a backbone alone"):
        list(prototypes(evaluation(tmp_path, source="facebook/dino-vits16"), PrototypesOptions()))
    torch.save({"cls_token": torch.zeros(1)}, tmp_path / "backbone.pth")
    with pytest.raises(NotApplicable, match="in the head, which this file lacks"):
        list(prototypes(evaluation(tmp_path, source=str(tmp_path / "backbone.pth")), PrototypesOptions()))
    with pytest.raises(NotApplicable, match="no MLP"):
        read_head({"head.last_layer.weight_g": torch.ones(3, 1), "head.last_layer.weight_v": torch.ones(3, 2)}, "none")
    with pytest.raises(ValueError, match=r"`k` \(=0\) must be at least 1"):
        PrototypesOptions(k=0)
