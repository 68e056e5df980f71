"""The evaluation's page: the paper's numbers as printed, ours in the right cells, and HTML that needs nothing else."""

import json
import re
from html.parser import HTMLParser

import pytest

import evaluate
from config.recipe import load_recipe
from evaluators.prototypes.tables import write_table
from reporting.evaluation_page import write_page, write_page_again
from reporting.paper.rows import SOURCES, ablation_row, find, paper_row_of, row_names
from reporting.paper.sections import section
from reporting.paper.tables import (
    ABLATION,
    FEW_SHOT,
    FINE_TUNING,
    IMAGENET,
    RETRIEVAL,
    TABLES,
    TRANSFER,
    UTILISATION,
    VIDEO,
)

# Sums of a table's columns and its number of entries, added up from the paper's print, not from paper.tables.
PRINTED = {
    "1": ([421.12], 6),
    "2": ([681.84, 620.40, 780.12], 27),
    "3": ([364.7, 441.3, 506.4, 545.6], 32),
    "4": ([3786, 59398], 8),
    "5": ([441.4, 751.9, 774.6, 683.6, 593.2, 757.7, 648.0, 750.6, 542.5, 660.4], 80),
    "6": ([502.9, 280.5, 282.4, 103.0], 32),
    "7": ([493.7, 480.9, 506.6], 24),
    "14, 15": ([1089.4, 998.1, 1082.2, 595.1, 1075.3], 53),
}


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.number)
def test_the_papers_tables_are_as_printed(table):
    columns = list(zip(*table.rows.values(), strict=True))
    assert len(columns) == len(table.columns)
    sums, entries = PRINTED[table.number]
    assert [sum(value or 0 for value in column) for column in columns] == pytest.approx(sums, abs=1e-6)
    assert sum(value is not None for column in columns for value in column) == entries
    assert set(table.deviations) in (set(), set(table.rows))


def test_single_numbers_of_the_paper():
    assert ABLATION.rows["vmf, probability"] == (70.87,)
    assert IMAGENET.rows["ViT-B/16 iBOT-vMF"] == (78.66, 80.20, 80.27)
    assert FEW_SHOT.rows["ViT-S/16 MSN"] == (47.1, 55.8, 62.8, 67.2)
    assert FEW_SHOT.deviations["ViT-S/16 DINO-vMF"] == (0.6, 0.7, 0.2, None)
    assert UTILISATION.rows["ViT-B/16 DINO"] == (775, 54877)
    assert RETRIEVAL.rows["ViT-B/16 DINO-vMF"] == (66.7, 39.5, 37.3, 12.5)
    assert VIDEO.rows["ViT-S/16 DINO"] == (61.8, 60.2, 63.4)
    assert FINE_TUNING.rows["ViT-B/16 MAE"] == (None, None, None, None, 83.6)
    for *accuracies, average in TRANSFER.rows.values():
        assert sum(accuracies) / 9 == pytest.approx(average, abs=0.051)


def row(protocol, metric, value, **more):
    common = {"features": "teacher", "split": "test", "data": "/x/imagenet", "n": 50_000, "date": "2030-01-02T03:04:05"}
    return {"protocol": protocol, "metric": metric, "value": value, **common, **more}


def test_every_cell_has_a_source_and_finds_it():
    for table in TABLES:
        columns = [column for column in table.columns if column != "average"]
        assert list(SOURCES[table.number]) == columns
        rows = [
            row(s.protocol, s.metric, index, data=f"/sun/{c}")
            for index, (c, s) in enumerate(SOURCES[table.number].items())
        ]
        for index, source in enumerate(SOURCES[table.number].values()):
            assert find(rows, source)["value"] == index, source


def test_the_last_row_of_pretrained_features_counts():
    rows = [row("knn", "top1", 0.5), row("knn", "top1", 0.6), row("knn", "top1", 0.1, features="random")]
    assert find(rows, SOURCES["2"]["kNN"])["value"] == 0.6
    cifar = [row("transfer", "top1", 0.9, data="cifar-10"), row("transfer", "top1", 0.7, data="CIFAR_100")]
    assert find(cifar, SOURCES["5"]["CIFAR10"])["value"] == 0.9
    assert find(cifar, SOURCES["5"]["CIFAR100"])["value"] == 0.7
    assert find(cifar, SOURCES["5"]["Flowers"]) is None


def test_a_section_in_full():
    rows = [row("fewshot", "1-shot", 0.5034, sd=0.0041), row("fewshot", "5-shot", 0.6611, n=None)]
    found = section(FEW_SHOT, rows, "ViT-S/16 MSN", {})
    assert found.head == ["", "this checkpoint", "paper: ViT-S/16 MSN", "measured on"]
    assert found.rows == [
        ["1 img/cls", "50.3 ± 0.4", "47.1 ± 0.1", "imagenet, test, n = 50000"],
        ["2 imgs/cls", "–", "55.8 ± 0.6", ""],
        ["5 imgs/cls", "66.1", "62.8 ± 0.3", "imagenet, test"],
        ["1% imgs", "–", "67.2", ""],
    ]
    assert found.notes[0].startswith("Not measured: 2 imgs/cls, 1% imgs. To fill it: `evaluate.py fewshot")
    assert found.paper[4] == ["ViT-B/16 iBOT", "46.0", "56.0 ± 0.8", "64.7", "69.9"]


def test_what_cannot_be_compared_is_said():
    elsewhere = [row("knn", "top1", 0.7, data="photos", n=837)]
    assert section(IMAGENET, elsewhere, "ViT-S/16 DINO", {}).notes[-1] == (
        "Not comparable: the paper's numbers are on ImageNet, these on photos, test, n = 837."
    )
    few = [row("prototypes", "prototypes", 128), row("prototypes", "unique", 121), row("prototypes", "largest_set", 3)]
    found = section(UTILISATION, few, "ViT-S/16 DINO", {})
    assert [line[1:3] for line in found.rows] == [["121", "961"], ["3", "2087"]]
    assert found.notes == ["Not comparable: the paper's models have 65536 prototypes, this one 128."]
    unmatched = section(VIDEO, [row("video", "J&F-Mean", 0.5)], None, {})
    assert unmatched.rows[0] == ["J&F mean", "50.0", "–", "imagenet, test, n = 50000"]
    assert "--paper-row names one" in unmatched.notes[-1]
    left_out = section(VIDEO, [], None, {"video": "video: it needs DAVIS"}).notes
    assert left_out == ["Nothing was measured. video: it needs DAVIS. To fill it: `evaluate.py video --data DAVIS`."]


def test_the_average_of_transfer_needs_all_nine():
    sources = SOURCES["5"]
    rows = [row("transfer", sources[name].metric, 0.5 + index / 100, data=name) for index, name in enumerate(sources)]
    assert section(TRANSFER, rows, None, {}).rows[-1][1] == "54.0"
    assert section(TRANSFER, rows[1:], None, {}).rows[-1][1] == "–"


SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": 16}
SMALL |= {"image_size": 224, "local_size": 96}
BASE = SMALL | {"hidden_size": 768, "num_attention_heads": 12}


@pytest.mark.parametrize(
    ("recipe", "changes", "name"),
    [
        ("photos_dino_vmf", {}, None),
        ("photos_dino_vmf", SMALL, "ViT-S/16 DINO-vMF"),
        ("photos_dino", SMALL, "ViT-S/16 DINO"),
        (
            "photos_dino",
            BASE | {"normalization": "l2"},
            "ViT-B/16 DINO",
        ),
        ("photos_dino", SMALL | {"centering": "probability"}, None),
        ("photos_dino_vmf", SMALL | {"patch_size": 8}, None),
    ],
)
def test_the_row_of_a_recipe(recipe, changes, name):
    assert paper_row_of(load_recipe(recipe, changes)) == name
    assert name is None or name in row_names()


def test_the_cell_of_table_1():
    changes = SMALL | {"epochs": 100, "normalization": "l2", "centering": "probability"}
    recipe = load_recipe("photos_dino", changes)
    assert ablation_row(recipe) == "l2, probability"
    assert section(ABLATION, [row("knn", "top1", 0.7)], "l2, probability", {}).rows[0][1:3] == ["70.00", "69.86"]
    assert ablation_row(load_recipe("photos_dino", changes | {"epochs": 101})) is None
    assert section(ABLATION, [row("knn", "top1", 0.7)], None, {}).rows[0][1] == "–"  # another kind of run


class Page(HTMLParser):
    """Collects what a page would load; tags must be closed in their order."""

    def __init__(self, html):
        super().__init__()
        self.sources, self.open = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "srcset", "href")]
        if tag not in ("img", "source", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def output(tmp_path):
    rows = [row("knn", "top1", 0.7474, checkpoint="a<b>.pth"), row("knn", "top1", 0.1, checkpoint="another.pth")]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    write_table(tmp_path / "prototypes/duplicates.csv", [{"cosine": 0.9, "unique": 5, "largest_set": 2}])
    (tmp_path / "prototypes/duplicates.svg").touch()
    return tmp_path


def test_the_page_is_whole_and_loads_nothing(output, capsys):
    rows = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    path = write_page(
        output, rows, checkpoint="a<b>.pth", paper_row="ViT-S/16 DINO-vMF", left_out={"video": "video: <no>"}
    )
    html = path.read_text(encoding="utf-8")
    parsed = Page(html)
    assert parsed.open == []
    assert len(parsed.sources) == 2  # one chart, light and dark
    assert all(source.startswith("data:image/svg") for source in parsed.sources)
    assert "url(" not in html
    assert "a&lt;b&gt;.pth" in html
    assert "video: &lt;no&gt;" in html
    assert "<td>74.74</td><td>74.74</td>" in html
    assert "<td>10.00</td>" not in html  # of another checkpoint
    markdown = (output / "evaluation.md").read_text(encoding="utf-8")
    assert "| kNN | 74.74 | 74.74 | imagenet, test, n = 50000 |" in markdown
    assert "![duplicates](prototypes/duplicates.svg)" in markdown
    assert markdown.index("Accuracy on 50000 test images of imagenet") < markdown.index("## Table 2. ")
    assert re.findall("^## Table (.*?)\\.", markdown, re.MULTILINE) == ["2"]  # the only one with a number
    assert len(re.findall("^Table .*To fill it: ", markdown, re.MULTILINE)) == len(TABLES) - 1
    evaluate.main(["page", str(output), "--checkpoint", "a<b>.pth", "--paper-row", "ViT-S/16 DINO-vMF"])
    assert capsys.readouterr().out.strip() == str(path)
    assert path.read_text(encoding="utf-8") == html.replace("video: &lt;no&gt;. ", "")


def test_a_table_of_the_paper_appears_where_it_applies(tmp_path):
    small = [row("knn", "top1", 0.7, data="mine", n=837), row("prototypes", "prototypes", 128)]
    small.append(row("prototypes", "unique", 100))
    path = write_page(tmp_path, small, checkpoint="x", recipe=load_recipe("photos_dino"))
    for text in (path.read_text(encoding="utf-8"), (tmp_path / "evaluation.md").read_text(encoding="utf-8")):
        assert "Accuracy on 837 test images of mine" in text
        assert "100 of 128" in text
        assert "Table" not in text
        assert "ImageNet" not in text
    write_page(tmp_path, small, checkpoint="x", paper_row="ViT-S/16 DINO")  # asked for
    markdown = (tmp_path / "evaluation.md").read_text(encoding="utf-8")
    assert re.findall("^## Table (.*?)\\.", markdown, re.MULTILINE) == ["2", "4"]
    assert markdown.count("Not comparable: ") == 2


def test_the_page_refuses(output, tmp_path_factory):
    with pytest.raises(ValueError, match=r"`paper_row` \(='ViT-X'\) must be one of ViT-B/16 iBOT, "):
        write_page(output, [], checkpoint="x", paper_row="ViT-X")
    with pytest.raises(FileNotFoundError, match=r"no results in .*: expected .*results\.jsonl"):
        write_page_again(tmp_path_factory.mktemp("empty"))
