"""The ablation's commands, its table, and one pass through all of it with tiny runs."""

import json
import shlex

import pytest

import ablation
from ablation import Ablation, in_lanes, main, table
from config.recipe import parse_overrides
from lanes_here import run_lanes_here


def write_result(run, value, split="val", features="teacher", protocol="knn", metric="top1"):
    run.mkdir(parents=True, exist_ok=True)
    row = {"protocol": protocol, "features": features, "split": split, "metric": metric, "value": value}
    with (run / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def test_every_cell_and_seed_is_pretrained_and_evaluated_once(tmp_path, capsys):
    options = Ablation("photos_dino_vmf", tmp_path, seeds=(3, 5), dry_run=True)
    main(options)
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if "--output" in line]
    cells = set()
    for command in commands:
        given = command[command.index("--set") + 1 :]
        cell = parse_overrides(given)
        cells.add(
            (cell["normalization"], cell["centering"], cell.get("center_on"), command[command.index("--seed") + 1])
        )
    assert len(commands) == len(cells) == 14
    assert {cell[-1] for cell in cells} == {"3", "5"}
    assert {cell[:2] for cell in cells if cell[2] == "scores"} == {("vmf", "probability")}
    assert not any(tmp_path.iterdir())  # nothing was run


def test_what_is_done_is_not_done_again(tmp_path):
    options = Ablation("photos_dino_vmf", tmp_path)
    assert len(options.jobs()) == 42
    run = options.directory("l2", "logit", 42)
    write_result(run, 0.5, split="test")
    (run / "checkpoint.pt").touch()
    (job,) = [job for job in options.jobs() if "pretrain.py" in job.command[1] and job.title.startswith(run.name)]
    assert "--resume" in job.command
    (run / "backbone").mkdir()
    write_result(run, 0.5)
    assert len(options.jobs()) == 40
    write_result(run, 7, split="train", protocol="prototypes", metric="used_logits")
    assert len(options.jobs()) == 39  # nothing of this run: its kappa are equal, so kNN cannot be divided by them
    write_result(run, 0.5, split="test", protocol="prototypes", metric="top1@kappa_0-20")
    assert len(options.jobs()) == 40
    write_result(run, 0.5, protocol="prototypes", metric="top1@kappa_0-20")
    assert len(options.jobs()) == 39


def test_the_jobs_of_a_cell_stay_in_one_lane_and_in_order(tmp_path):
    jobs = Ablation("photos_dino_vmf", tmp_path).jobs()
    lanes = in_lanes(jobs, 5)
    assert sorted(job.title for lane in lanes.values() for job in lane) == sorted(job.title for job in jobs)
    for lane in lanes.values():
        assert [job.title.split(", ")[1] for job in lane] == ["pretraining", "knn", "prototypes"] * (len(lane) // 3)


def test_the_table_has_every_seed_mean_and_spread(tmp_path):
    options = Ablation("photos_dino_vmf", tmp_path)
    for seed, value in ((0, 0.7112), (42, 0.7062)):
        write_result(options.directory("vmf", "probability", seed), value)
    write_result(options.directory("none", "logit", 0), 0.7043)
    write_result(options.directory("none", "logit", 42), 0.1, features="random")
    none, l2, vmf = table(options).splitlines()[2:]
    assert vmf == "| vMF | – – | 71.12 70.62 (mean 70.87, sd 0.35) | – – |"
    assert none == "| None | 70.43 – | – – |  |"
    assert l2 == "| L2 | – – | – – |  |"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": (1, 1)}, r"`seeds` \(=\(1, 1\)\) must be at least two different numbers"),
        ({"lanes": 0}, r"`lanes` \(=0\) must be at least 1"),
        ({"recipe": "photos_msn"}, r"`recipe` \(='photos_msn'\) is of the method 'msn', which has no centring"),
    ],
)
def test_wrong_options_are_named(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Ablation(**{"recipe": "photos_dino_vmf", "output": tmp_path, **options})


@pytest.mark.slow
def test_two_cells_from_nothing_to_the_table(tmp_path, monkeypatch, capsys):
    import yaml

    from config.recipe import RECIPES

    settings = yaml.safe_load((RECIPES / "photos_dino_vmf.yaml").read_text())
    settings |= {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "out_dim": 32, "hidden_dim": 16}
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(ablation, "run_lanes", run_lanes_here)
    monkeypatch.setattr(ablation, "NORMALIZATIONS", {"vmf": "vMF"})
    monkeypatch.setattr(ablation, "CENTRES", {"probability": {"centering": "probability"}})
    main(Ablation(str(recipe), tmp_path / "runs", max_steps=2))
    *_, header, _, line = capsys.readouterr().out.splitlines()
    assert header.startswith("| kNN, val |")
    assert "mean" in line
    assert "–" not in line
