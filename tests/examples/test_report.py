"""The report: charts from numbers, pictures from images, and one page that needs nothing else."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from config.recipe import load_recipe
from data.augment import to_tensor
from data.images import CELL, load_photo, split_columns
from evaluators.features.extraction import Features
from methods.backbone import build_backbone
from methods.dino import DINO
from reporting import charts, pictures
from reporting.demo.report import write_report
from reporting.demo.story import rise, speeds, spread, use
from reporting.demo_table import MODELS, RUNS
from training.run import save_checkpoint

TINY = {
    **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_dim": 16, "bottleneck_dim": 8},
    **{"out_dim": 24, "num_workers": 0},
}


def metrics(offset=0.0):
    rows = []
    for step in range(1, 41):
        target, marginal = 2 + math.exp(-step / 10) + offset, 3 - offset
        row = {"step": step, "epoch": (step - 1) // 10, "target_entropy": target, "marginal_entropy": marginal}
        rows.append({**row, "kl": 0.5, "loss": target + 0.5, "seconds": 0.1 * step})
    return rows


@pytest.fixture
def figure(monkeypatch):
    """Makes the charts return matplotlib's figure in place of its SVG."""
    monkeypatch.setattr(charts, "to_svg", lambda drawn: drawn)


def test_curves_mark_the_logarithm_of_k_and_average_over_an_epoch(figure):
    rows = metrics()
    drawn = charts.curves({"DINO": rows, "DINO-vMF": metrics(0.3)}, {"DINO": 24, "DINO-vMF": 24})
    loss = drawn.axes[0]
    thin, thick = loss.lines[0], loss.lines[1]
    assert thin.get_ydata() == pytest.approx([row["loss"] for row in rows])
    assert thin.get_xdata()[[0, 9, 39]] == pytest.approx([0.1, 1.0, 4.0])
    assert thick.get_ydata()[20] == pytest.approx(np.mean([row["loss"] for row in rows[15:26]]))
    marked = [{line.get_ydata()[0] for line in axis.lines if len(line.get_ydata()) == 2} for axis in drawn.axes]
    assert marked == [{math.log(24)}, set(), {math.log(24)}, {math.log(24)}]


def test_kappa_histogram_counts_every_prototype(figure):
    kappas = {"DINO": np.linspace(8, 12, 50), "DINO-vMF": np.linspace(2, 30, 70)}
    drawn = charts.kappa_histogram(kappas, 0.1)
    assert [sum(bar.get_height() for bar in axis.patches) for axis in drawn.axes] == [50, 70]
    assert all(axis.lines[0].get_xdata()[0] == pytest.approx(10) for axis in drawn.axes)


def test_usage_is_sorted_and_ends_at_the_last_used_prototype(figure):
    counts = {"scores": {"DINO": np.array([0, 3, 0, 9]), "DINO-vMF": np.array([4, 3, 0, 5])}}
    axis = charts.usage(counts).axes[0]
    assert [list(stairs.get_data().values) for stairs in axis.patches] == [[9, 3], [5, 4, 3]]
    assert [text.get_text() for text in axis.get_legend().texts] == ["DINO: 2 of 4 used", "DINO-vMF: 3 of 4 used"]
    assert axis.lines[0].get_ydata()[0] == 12 / 4


def test_accuracy_by_kappa_has_the_standard_errors(figure):
    rows = [{"value": value, "standard_error": 0.04, "n": 100} for value in (0.5, 0.75)]
    axis = charts.accuracy_by_kappa({"DINO": rows, "DINO-vMF": rows[:1]}).axes[0]
    lines = [container.lines[0].get_ydata() for container in axis.containers]
    assert [list(line) for line in lines] == [[50, 75], [50]]
    (bars,) = axis.containers[0].lines[2]
    assert bars.get_segments()[0][:, 1] == pytest.approx([46, 54])


def test_charts_are_svg_reproducible_and_differ_between_light_and_dark():
    light, dark = (charts.kappa_histogram({"a": np.arange(1.0, 9)}, 0.1, dark=dark) for dark in (False, True))
    assert ElementTree.fromstring(light).tag.endswith("svg")
    assert light == charts.kappa_histogram({"a": np.arange(1.0, 9)}, 0.1)
    assert charts.INK[False] in light
    assert charts.INK[True] in dark


def test_to_image_undoes_to_tensor():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(pictures.to_image(to_tensor(Image.fromarray(pixels)))), pixels)


def test_splits_drawn_dims_what_belongs_to_none():
    photo = load_photo("chelsea.png")
    drawn = np.asarray(pictures.splits_drawn(photo, scale=1)).astype(int)
    columns = split_columns(photo.width // CELL)
    owned = {column for members in columns.values() for column in members}
    for column in range(photo.width // CELL):
        middle = np.s_[8:24, column * CELL + 8 : column * CELL + 24]
        assert np.array_equal(drawn[middle], np.asarray(photo)[middle]) == (column in owned)
    for split, members in columns.items():
        corner = drawn[1, members[0] * CELL + 1]
        assert "#{:02X}{:02X}{:02X}".format(*corner) == pictures.SPLIT_COLORS[split]


def test_nearest_agrees_with_a_loop():
    rng = np.random.default_rng(0)
    bank, queries = (Features(rng.normal(size=(n, 5)).astype(np.float32), np.zeros(n, int), []) for n in (30, 6))
    for row, query in zip(pictures.nearest(bank, queries, [4, 1], 3), [4, 1], strict=True):
        y = queries.x[query]
        cosine = [float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)) for x in bank.x]
        assert list(row) == sorted(range(30), key=lambda index: -cosine[index])[:3]


def test_queries_are_of_different_classes():
    labels = np.arange(100) % 7
    indices = pictures.pick_queries(labels, 5)
    assert len({labels[index] for index in indices}) == 5
    assert indices == pictures.pick_queries(labels, 5)
    assert len(pictures.pick_queries(labels, 20)) == 7


def test_token_maps_have_a_pixel_per_token_and_separate_two_halves():
    torch.manual_seed(0)
    backbone = build_backbone(load_recipe("photos_dino_vmf", TINY)).eval()
    halves = Image.new("RGB", (96, 64), "black")
    halves.paste("white", (48, 0, 96, 64))
    (tokens,) = pictures.token_maps(backbone, [halves], (96, 64))
    assert tokens.size == (12, 8)
    first = np.asarray(tokens)[:, :, 0].astype(int)
    assert abs(first[:, :6].mean() - first[:, 6:].mean()) > 100


class Page(HTMLParser):
    """Collects where a page would load something from, and its text."""

    def __init__(self, html):
        super().__init__()
        self.sources, self.open, self.words = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.sources += [attributes[name] for name in ("src", "srcset", "href") if name in attributes]
        if tag == "img":
            assert attributes["alt"]
        if tag not in ("img", "source", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("p", "li") or self.open[-1] == tag:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data.split()


@pytest.fixture(scope="module")
def demo_output(tmp_path_factory):
    """A demo's directory with tiny, untrained runs, and made-up results for them."""
    output = tmp_path_factory.mktemp("demo")
    recipes = {}
    for run in RUNS.values():
        recipe = load_recipe(run, TINY)
        (output / run).mkdir()
        state = {"recipe": recipe, "method": DINO(recipe).state_dict(), "step": 40, "epoch": 4}
        save_checkpoint(output / run, state)
        (output / run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics()))
        recipes[run] = vars(recipe)
    columns = ("kNN", "1-shot", "5-shot", "linear")
    table = [
        {"model": model, "prototypes": 24, "used by logits": 3, "used by targets": 5 * row, "seconds": 4.0}
        | {"κ 5–95 %": [8.0, 8.0 + row]}
        | {column: 0.5 + 0.1 * row for column in columns}
        | {f"{column} ±": 0.02 for column in columns}
        for row, model in enumerate(MODELS)
    ]
    pair = {"a": "DINO-vMF", "b": "randomly initialised ViT", "difference": 0.2, "standard_error": 0.01, "n": 600}
    results = {
        "date": "2030-01-01", "machine": {"cpu": "<a CPU>", "cores": 2, "system": "Linux"}, "versions": {"torch": "9"},
        "recipes": recipes, "steps": dict.fromkeys(recipes, 40), "table": table, "knn_comparisons": [pair],
        "evaluations": {
            "photos_dino": [{"protocol": "fewshot", "metric": "1-shot", "draws": 20}],
            "photos_dino_vmf": [
                {"protocol": "prototypes", "metric": f"top1@kappa_{name}", "kappa_low": low, "kappa_high": low + 2}
                | {"value": 0.05 * low, "n": 300, "standard_error": 0.03}
                for name, low in (("50-100", 11.0), ("0-50", 8.0))
            ],
        },
    }  # fmt: skip
    return output, results


@pytest.fixture(scope="module")
def page(demo_output):
    output, results = demo_output
    return write_report(output, results).read_text(encoding="utf-8")


def test_the_page_is_whole_and_loads_nothing(page):
    parsed = Page(page)
    assert parsed.open == []
    assert len(parsed.sources) > 100
    assert all(source.startswith("data:image/") for source in parsed.sources)
    assert "$" not in page
    assert "url(" not in page


def test_the_page_says_what_the_numbers_say(page):
    text = " ".join(Page(page).words)
    assert "DINO-vMF is above the randomly initialised ViT: +20.0 ± 1.0 points, 20.0 standard errors." in text
    assert "DINO 10 of 24, DINO-vMF 15 of 24. The two use similarly many." in text
    assert "DINO 8.0 to 10.0 (a factor 1.2); DINO-vMF 8.0 to 11.0 (a factor 1.4)." in text
    assert (
        "from the lowest κ to the highest, per cent: DINO-vMF 40 55. Each number has a standard error of up to 3"
        in text
    )
    assert "raw pixels 50.0 %, randomly initialised ViT 60.0 %, DINO 70.0 %, DINO-vMF 80.0 %" in text
    assert "This is a shortened run, 40 of" in text
    assert "differ in name (photos_dino / photos_dino_vmf), normalization (none / vmf), centering" in text
    assert "&lt;a CPU&gt;" in page


def test_the_page_tells_of_use_then_of_kappa_then_of_accuracy(page):
    heads = re.findall(r"<h2>(.*?)</h2>", page)
    assert heads[:3] == ["Which prototypes are used", "What their norms say", "What the features are worth"]
    places = [page.index(words) for words in ("largest target of some", "middle 90 %", "kNN is right on")]
    assert places == sorted(places)


def test_other_uses_and_concentrations_give_other_words():
    rows = [
        {"model": "DINO", "used by targets": 9, "prototypes": 128, "κ 5–95 %": [9.5, 10.5]},
        {"model": "DINO-vMF", "used by targets": 108, "prototypes": 128, "κ 5–95 %": [0.0, 12.0]},
    ]
    assert use(rows).endswith("DINO 9 of 128, DINO-vMF 108 of 128. DINO-vMF uses 12.0 times as many as DINO.")
    assert use(rows[::-1]).endswith("DINO-vMF uses 12.0 times as many as DINO.")
    assert "DINO 9.5 to 10.5 (a factor 1.11: they have hardly moved); DINO-vMF 0.0 to 12.0 (a factor inf)" in spread(
        rows
    )
    speed = {"photos_dino": {"norms_lr_multiplier": 0.0}, "photos_dino_vmf": {"norms_lr_multiplier": 10.0}}
    assert "DINO's as fast, DINO-vMF's 10 times as fast as the directions: spreads cannot be compared" in speeds(speed)
    assert speeds({run: speed["photos_dino"] for run in speed}) == ""
    assert rise({"DINO": []}) == "No accuracy can be given by κ, because all κ are still equal."


def test_other_numbers_give_other_words(demo_output):
    output, results = demo_output
    pair = {**results["knn_comparisons"][0], "difference": -0.02}
    text = " ".join(Page(write_report(output, {**results, "knn_comparisons": [pair]}).read_text()).words)
    assert "is above" not in text
    assert "DINO-vMF and the randomly initialised ViT cannot be told apart: −2.0 ± 1.0 points" in text
