"""The report's figures: each function returns HTML for the placeholders of templates/demo_report.html."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from data.images import CELL, Images, load_photo, split_columns
from data.views import multi_crop
from evaluators.prototypes.choices import choose
from evaluators.prototypes.components import of_run
from evaluators.request import make_features
from reporting import charts, pictures
from reporting.demo.story import accuracy_by_kappa
from reporting.html_parts import chart, image, neighbour_row
from training.run import Run, random_backbone

QUERIES, NEAREST = 10, 6
MAP_SIZE = (384, 256)


def data_pictures(run: Run, train: Images) -> dict[str, Any]:
    """Return the splits on one photograph and some multi-crop draws."""
    photo = load_photo("chelsea.png")
    columns = split_columns(photo.width // CELL)
    key = [
        f"<span style='color:{color}'>■</span> {split}, {len(columns[split])} columns of cells"
        for split, color in pictures.SPLIT_COLORS.items()
    ]
    rows = ""
    indices = pictures.pick_contrast(train, ("astronaut", "chelsea", "coffee", "rocket"))
    for index, (cell, *views) in zip(indices, pictures.crops(train, indices, multi_crop(run.recipe)), strict=True):
        name = train.classes[train.labels[index]].replace("_", " ")
        shown = "".join(image(view, f"augmented view of {name}", width=3 * view.width) for view in views)
        rows += f"<div class='row'><span class='name'>{name}</span>{image(cell, name, width=96)}<i></i>{shown}</div>"
    drawn = image(
        pictures.splits_drawn(photo), "a photograph cut into the columns of the splits", width=3 * photo.width // 2
    )
    return {
        "splits": drawn,
        "split_key": " &ensp; ".join(key),
        "crops": rows,
        "local_crops": run.recipe.num_local_crops,
    }


def training_chart(metrics: dict[str, list[dict[str, float]]], runs: dict[str, Run]) -> dict[str, Any]:
    """Return the chart of loss, KL and entropies, and where the entropies ended."""
    sizes = {label: run.recipe.out_dim for label, run in runs.items()}
    ends = []
    for label, rows in metrics.items():
        last = [row for row in rows if row["epoch"] == rows[-1]["epoch"]]
        keys = ("target_entropy", "marginal_entropy")
        target, marginal = (np.mean([row[key] for row in last]) / math.log(sizes[label]) for key in keys)
        ends.append(f"{label} targets {target:.2f} ln K, their mean {marginal:.2f} ln K")
    drawn = chart(lambda dark: charts.curves(metrics, sizes, dark=dark), "loss, KL and entropies against the epoch")
    return {"curves": drawn, "entropies": "; ".join(ends)}


def prototype_charts(runs: dict[str, Run], evaluations: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the charts of the use and the concentration of the prototypes, and of kNN by it."""
    temperature = runs["DINO-vMF"].recipe.student_temp
    kappas = {label: run.head.last_layer.norms.numpy() / temperature for label, run in runs.items()}
    counts: dict[str, dict[str, np.ndarray]] = {
        "Winner by the teacher's logits": {},
        "Winner by the centred targets": {},
    }
    for label, run in runs.items():
        for panel, winners in zip(counts.values(), prototype_winners(run), strict=True):
            panel[label] = np.bincount(winners, minlength=run.recipe.out_dim)
    centerings = {label: run.recipe.centering for label, run in runs.items()}
    named = " and ".join(f"{label} by {centering}" for label, centering in centerings.items())
    caution = f"The runs centre differently ({named}), so a difference here is not the effect of the constant alone."
    ranges = {label: accuracy_by_kappa(rows) for label, rows in evaluations.items()}
    divided = {label: rows for label, rows in ranges.items() if rows}
    by_kappa = chart(lambda dark: charts.accuracy_by_kappa(divided, dark=dark), "kNN by kappa") if divided else ""
    return {
        "temperature": f"{temperature:g}",
        "kappa": chart(lambda dark: charts.kappa_histogram(kappas, temperature, dark=dark), "histograms of kappa"),
        "usage": chart(lambda dark: charts.usage(counts, dark=dark), "images won by each prototype, sorted"),
        "by_kappa": by_kappa,
        "centering": caution if len(set(centerings.values())) > 1 else "",
    }


def prototype_winners(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Return the prototypes of the largest logit and of the largest target of each un-augmented training image."""
    features = make_features(run, "teacher")("train").x
    chosen = choose(of_run(run), features, np.arange(len(features))).prototypes
    return chosen["logits"].numpy(), chosen["targets"].numpy()


def neighbours(run: Run, train: Images, test: Images) -> dict[str, Any]:
    """Return test cells with their nearest training cells, for the teacher beside the random ViT."""
    indices = pictures.pick_queries(test.labels, QUERIES)
    found = {}
    for title, features in {"DINO-vMF": "teacher", "random ViT": "random"}.items():
        features_of = make_features(run, features)
        found[title] = pictures.nearest(features_of("train"), features_of("test"), indices, NEAREST)
    heads = "".join(f"<b>{title}</b>" for title in found)
    rows = [f"<div class='neighbours'><span class='name'></span><b>query</b>{heads}</div>"]
    rows += [neighbour_row(test, query, train, [n[row] for n in found.values()]) for row, query in enumerate(indices)]
    right = {title: (train.labels[n] == test.labels[indices][:, None]).sum() for title, n in found.items()}
    shares = " and ".join(f"{right[title]} of {n.size} for {title}" for title, n in found.items())
    return {"neighbours": "".join(rows), "queries": len(indices), "nearest": NEAREST, "right": shares}


def token_pictures(runs: dict[str, Run]) -> dict[str, Any]:
    """Return a PCA of the patch tokens of two whole photographs, for the pretrained backbones beside the random one."""
    photos = [load_photo(name) for name in ("chelsea.png", "coffee.png")]
    backbones = {label: run.backbone for label, run in runs.items()}
    backbones["random ViT"] = random_backbone(runs["DINO-vMF"].recipe)
    maps = {"photograph": [photo.resize(MAP_SIZE) for photo in photos]}
    maps |= {label: pictures.token_maps(backbone, photos, MAP_SIZE) for label, backbone in backbones.items()}
    cells = "".join(f"<b>{title}</b>" for title in maps)
    cells += "".join(image(maps[title][row], title, css="fill") for row in range(len(photos)) for title in maps)
    tokens = [side // runs["DINO-vMF"].recipe.patch_size for side in MAP_SIZE]
    sizes = {name: " × ".join(map(str, size)) for name, size in (("map_size", MAP_SIZE), ("map_tokens", tokens))}
    return {"tokens": cells, **sizes}
