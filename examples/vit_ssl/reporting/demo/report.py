"""The demo's report, one HTML file that needs nothing else."""

from __future__ import annotations

from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from data.images import CELL, Images, load_images
from reporting.demo.figures import data_pictures, neighbours, prototype_charts, token_pictures, training_chart
from reporting.demo.story import story
from reporting.demo_table import RUNS, STANDARD_ERRORS, read_rows, sentence
from reporting.html_parts import table_html
from training.run import Run, load_run

TEMPLATE = Path(__file__).parents[1] / "templates" / "demo_report.html"


def write_report(output: Path, results: dict[str, Any]) -> Path:
    """Write OUTPUT/report.html from the runs in OUTPUT and the demo's `results`; returns its path.

    The words are those of demo_report.html; every number in them, and which sentence is said, comes from the runs.
    """
    runs = {label: load_run(output / run) for label, run in RUNS.items()}
    recipe = runs["DINO-vMF"].recipe
    train, test = (load_images(recipe.dataset, split) for split in ("train", "test"))
    parts = summary(results, runs["DINO-vMF"], train, test) | provenance(results)
    parts |= data_pictures(runs["DINO-vMF"], train)
    parts |= training_chart({label: read_rows(output / run / "metrics.jsonl") for label, run in RUNS.items()}, runs)
    parts |= prototype_charts(runs, {label: results["evaluations"][run] for label, run in RUNS.items()})
    parts |= neighbours(runs["DINO-vMF"], train, test)
    parts |= token_pictures(runs)
    path = output / "report.html"
    path.write_text(Template(TEMPLATE.read_text(encoding="utf-8")).substitute(parts), encoding="utf-8")
    return path


def summary(results: dict[str, Any], run: Run, train: Images, test: Images) -> dict[str, Any]:
    """Return the first paragraphs and the table."""
    recipe, comparisons = run.recipe, results["knn_comparisons"]
    whole = recipe.epochs * (len(train) // recipe.batch_size)
    notice = f"This is a shortened run, {run.step} of {whole} steps: it shows that the path works and nothing else."
    draws = {row["draws"] for rows in results["evaluations"].values() for row in rows if row["protocol"] == "fewshot"}
    return {
        "shortened": f"<p class='notice'>{notice}</p>" if run.step < whole else "",
        "parameters": round(sum(parameter.numel() for parameter in run.backbone.parameters()) / 1000),
        "layers": recipe.num_hidden_layers,
        "width": recipe.hidden_size,
        "patch": recipe.patch_size,
        "steps": run.step,
        "batch": recipe.batch_size,
        "seed": recipe.seed,
        "cell": CELL,
        "classes": len(test.classes),
        "train_images": len(train),
        "test_images": len(test),
        "majority": f"{100 * np.bincount(test.labels).max() / len(test):.1f}",
        "accuracies": ", ".join(f"{escape(row['model'])} {100 * row['kNN']:.1f} %" for row in results["table"]),
        **{f"{name}_story": escape(words) for name, words in story(results).items()},
        "table": table_html(results["table"]),
        "draws": max(draws),
        "standard_errors": f"{STANDARD_ERRORS:g}",
        "findings": "".join(f"<li>{escape(sentence(pair))}</li>" for pair in comparisons),
    }


def provenance(results: dict[str, Any]) -> dict[str, Any]:
    """Return the date, machine, versions and settings."""
    machine, recipes = results["machine"], list(results["recipes"].values())
    differing = [name for name in recipes[0] if any(recipe[name] != recipes[0][name] for recipe in recipes)]
    values = [f"{name} ({' / '.join(str(recipe[name]) for recipe in recipes)})" for name in differing]
    shared = [(name, escape(str(value))) for name, value in recipes[0].items() if name not in differing]
    return {
        "date": results["date"],
        "machine": escape(f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}"),
        "versions": escape(", ".join(f"{name} {version}" for name, version in results["versions"].items())),
        "differing": escape(", ".join(values)),
        "settings": "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in shared),
    }
