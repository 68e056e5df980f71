"""The benchmark of probes: corrupted copies of the photographs, and tables that are those of the result file."""

import numpy as np
from benchmarks import probes
from benchmarks.marked_tables import names
from PIL import Image

from data.images import load_images
from evaluators.linear.shifted_sets import corrupted_folders


def test_the_page_shows_the_committed_results() -> None:
    page = probes.DOCS.read_text()
    assert names(page, group="probes") == list(probes.TABLES)
    assert probes.rendered(page) == page, "run `python -m benchmarks probes`"


def test_corrupted_copies_are_worse_the_more_severe_they_are(tmp_path, monkeypatch) -> None:
    images = load_images("photos", "test")
    few = images.__class__(images.name, "test", images.classes, images.labels[:5], images.items[:5])
    monkeypatch.setattr(probes, "load_images", lambda *_: few)
    probes.corrupt(tmp_path)
    folders = corrupted_folders(tmp_path)
    assert sorted(folders) == ["blur", "contrast", "jpeg", "noise"]
    for severities in folders.values():
        distances = []
        for severity in range(1, 6):
            copies = sorted(severities[severity].rglob("*.*"))
            assert [path.parent.name for path in copies] == [few.classes[label] for label in few.labels]
            x = [np.asarray(Image.open(path), float) for path in copies]
            distances.append(np.mean([np.abs(a - np.asarray(b)).mean() for a, (b, _) in zip(x, few, strict=True)]))
        assert distances == sorted(distances)
        assert distances[0] > 0.1


def test_a_line_has_the_mean_over_seeds_and_its_standard_error() -> None:
    rows = [{"arm": "DINO", "seed": seed, "robustness top1": 0.7 + 0.01 * seed} for seed in (0, 1)]
    rows += [{"arm": "raw pixels", "seed": 0, "robustness top1": 0.46}]
    result = {"device": "a CPU", "versions": {"torch": "2"}, "date": "today", "rows": rows}
    made = probes._attentive(result).splitlines()
    assert made[2].startswith("| raw pixels |  | 46.0 | – |")
    assert made[4].startswith("| DINO | 2 | 70.5 ± 0.5 | – |")
