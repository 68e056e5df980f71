import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

from backbone import build_backbone
from config import RECIPES, Recipe, differences, load_recipe, recipe_from_dict, save_recipe

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("photos_dino_vmf")


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_a_card_that_builds_its_backbone(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    header = [line for line in (RECIPES / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    for entry in ("Paper:", "Command:", "Hardware:", "Expect:"):
        assert any(entry in line for line in header), entry
    with torch.device("meta"):
        backbone = build_backbone(recipe, drop_path=recipe.drop_path)
    assert backbone.config.hidden_size == recipe.hidden_size
    assert len(backbone.layers) == recipe.num_hidden_layers


def test_plain_dino_differs_from_dino_vmf_in_table_1s_switches_only() -> None:
    plain, vmf = vars(load_recipe("photos_dino")), vars(load_recipe("photos_dino_vmf"))
    assert {name for name in plain if plain[name] != vmf[name]} == {"name", "normalization", "centering"}
    assert (plain["normalization"], plain["centering"]) == ("none", "logit")
    assert (vmf["normalization"], vmf["centering"]) == ("vmf", "probability")


def test_a_saved_recipe_is_the_same_recipe(recipe: Recipe, tmp_path: Path) -> None:
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_a_number_that_yaml_reads_as_text_is_a_number() -> None:
    assert yaml.safe_load("1e-3") == "1e-3"
    assert load_recipe("photos_dino_vmf", {"lr": "1e-3"}).lr == 1e-3


def test_differences_name_fields_but_not_the_number_of_workers(recipe: Recipe) -> None:
    assert differences(recipe, recipe) == []
    other = dataclasses.replace(recipe, lr=1.0, num_workers=3, normalization="l2")
    assert differences(other, recipe) == [
        "normalization: 'vmf' in the run, 'l2' requested",
        f"lr: {recipe.lr} in the run, 1.0 requested",
    ]


def test_an_unknown_name_lists_the_recipes() -> None:
    with pytest.raises(FileNotFoundError, match=r"no recipe `photo`: .* one of .*photos_dino, photos_dino_vmf"):
        load_recipe("photo")


def test_missing_and_unknown_fields_are_named(recipe: Recipe, tmp_path: Path) -> None:
    settings = dataclasses.asdict(recipe)
    with pytest.raises(ValueError, match=r"unknown fields learning_rate; the fields are name, method"):
        recipe_from_dict({**settings, "learning_rate": 1})
    del settings["lr"]
    with pytest.raises(ValueError, match=r"recipe: missing fields lr$"):
        recipe_from_dict(settings)
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match=r"list.yaml must hold `field: value` lines"):
        load_recipe(tmp_path / "list.yaml")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("normalization", "L2", r"`normalization` \(='L2'\) must be one of 'none', 'l2', 'vmf'"),
        ("epochs", 2.5, r"`epochs` \(=2.5\) must be of type int"),
        ("epochs", True, r"`epochs` \(=True\) must be of type int"),
        ("use_bn_in_head", 1, r"`use_bn_in_head` \(=1\) must be of type bool"),
        ("lr", "fast", r"`lr` \(='fast'\) must be of type float"),
        ("lr", float("nan"), r"`lr` \(=nan\) must be positive"),
        ("lr", 0, r"`lr` \(=0.0\) must be positive"),
        ("global_scale", 0.4, r"`global_scale` \(=0.4\) must be a pair of numbers"),
        ("batch_size", 0, r"`batch_size` \(=0\) must be at least 1"),
        ("patch_size", 0, r"`patch_size` \(=0\) must be at least 1"),
        ("weight_decay", -0.1, r"`weight_decay` \(=-0.1\) must be at least 0"),
        ("momentum_teacher", 1.5, r"`momentum_teacher` \(=1.5\) must be in \[0, 1\]"),
        ("drop_path", 1.0, r"`drop_path` \(=1.0\) must be in \[0, 1\)"),
        ("image_size", 31, r"`image_size` \(=31\) must be a multiple of `patch_size` \(=8\)"),
        ("hidden_size", 66, r"`hidden_size` \(=66\) must be a multiple of `num_attention_heads` \(=4\)"),
        ("warmup_epochs", 999, r"`warmup_epochs` \(=999\) must be at most `epochs` \(=\d+\)"),
    ],
)
def test_bad_values_name_the_field_the_value_and_what_is_allowed(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("photos_dino_vmf", {field: value})
