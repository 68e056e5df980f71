import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

from config.recipe import RECIPES, Recipe, differences, load_recipe, recipe_from_dict, save_recipe
from methods.backbone import blocks
from methods.registry import build_method

EM = {"mlp": "keep", "rows_per_prototype": 50, "max_kappa": 1000, "median_kappa": 0}
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("photos_dino_vmf")


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_a_card_that_builds_its_method(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    header = [line for line in (RECIPES / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    for entry in ("Paper:", "Command:", "Hardware:", "Expect:"):
        assert any(entry in line for line in header), entry
    with torch.device("meta"):
        method = build_method(recipe)
    method.attach()
    assert {parameter.device.type for parameter in method.parameters()} == {"meta"}
    shape = method.student.backbone.config
    assert (shape.hidden_size if recipe.backbone == "vit" else shape.hidden_sizes[-1]) == recipe.hidden_size
    assert len(blocks(method.student.backbone)) == recipe.num_hidden_layers
    assert method.prototypes().weight_v.shape == (recipe.out_dim, recipe.bottleneck_dim)


@pytest.mark.parametrize(
    ("name", "plain", "vmf", "others"),
    [
        ("photos_dino", ("none", "logit"), ("vmf", "probability"), {"bottleneck_dim", "norms_lr_multiplier"}),
        ("photos_ibot", ("none", "logit"), ("vmf", "probability"), set()),
        ("photos_msn", ("l2", "none"), ("vmf", "none"), set()),
    ],
)
def test_a_plain_method_differs_from_its_vmf_form_in_table_1s_switches_and_what_lets_norms_move(
    name: str, plain: tuple[str, str], vmf: tuple[str, str], others: set[str]
) -> None:
    switches = {"normalization", "centering"}
    found = [vars(load_recipe(recipe)) for recipe in (name, f"{name}_vmf")]
    assert {key for key in found[0] if found[0][key] != found[1][key]} - switches == {"name"} | others
    assert [(recipe["normalization"], recipe["centering"]) for recipe in found] == [plain, vmf]


@pytest.mark.parametrize("name", ["photos_dino_vmf", "photos_ibot", "photos_msn"])
def test_a_saved_recipe_is_the_same_recipe(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert recipe_from_dict(dataclasses.asdict(recipe)) == recipe  # as a checkpoint keeps it


def test_a_recipe_of_before_there_were_other_backbones_has_a_vit(recipe: Recipe) -> None:
    settings = dataclasses.asdict(recipe)
    del settings["backbone"], settings["feature_grid"], settings["prototype_koleo_weight"], settings["online_em"]
    assert recipe_from_dict(settings) == recipe


def test_a_number_that_yaml_reads_as_text_is_a_number() -> None:
    assert yaml.safe_load("1e-3") == "1e-3"
    assert load_recipe("photos_dino_vmf", {"lr": "1e-3"}).lr == 1e-3


def test_a_field_of_a_section_can_be_replaced() -> None:
    recipe = load_recipe("photos_msn", {"msn.patch_drop": "5e-1"})
    assert recipe.msn is not None
    assert recipe.msn.patch_drop == 0.5
    with pytest.raises(ValueError, match=r"photos_dino.yaml: no section msn to set patch_drop in"):
        load_recipe("photos_dino", {"msn.patch_drop": 0.5})


def test_differences_name_fields_but_not_the_number_of_workers(recipe: Recipe) -> None:
    assert differences(recipe, recipe) == []
    other = dataclasses.replace(recipe, lr=1.0, num_workers=3, normalization="l2")
    assert differences(other, recipe) == [
        "normalization: 'vmf' in the run, 'l2' requested",
        f"lr: {recipe.lr} in the run, 1.0 requested",
    ]
    ibot = load_recipe("photos_ibot")
    masked = load_recipe("photos_ibot", {"ibot.mask_ratio": [0.2, 0.3]})
    assert differences(masked, ibot) == ["ibot.mask_ratio: (0.1, 0.5) in the run, (0.2, 0.3) requested"]


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
    ibot = dataclasses.asdict(load_recipe("photos_ibot"))
    del ibot["ibot"]["mask_ratio"]
    with pytest.raises(ValueError, match=r"recipe: missing fields ibot.mask_ratio$"):
        recipe_from_dict(ibot)
    with pytest.raises(ValueError, match=r"recipe: unknown fields ibot.ratio; the fields are mask_probability, "):
        recipe_from_dict(ibot | {"ibot": ibot["ibot"] | {"ratio": 1}})
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
        ("lr", float("nan"), r"`lr` \(=nan\) must be a finite number"),
        ("weight_decay", "inf", r"`weight_decay` \(='inf'\) must be a finite number"),
        ("clip_grad", 10**400, r"`clip_grad` \(=1000.*\) must be of type float"),
        ("global_scale", [0.4, "-.inf"], r"`global_scale` \(='-.inf'\) must be of type float"),
        ("global_scale", [0.4, float("-inf")], r"`global_scale` \(=-inf\) must be a finite number"),
        ("global_scale", [0.5, 0.2], r"`global_scale` \(=\(0.5, 0.2\)\) must be \(low, high\) with 0 < low <= high"),
        ("local_scale", [0, 0.2], r"`local_scale` \(=\(0.0, 0.2\)\) must be \(low, high\) with 0 < low <= high"),
        ("blur_prob", [0, 0, 2], r"`blur_prob` \(=\(0.0, 0.0, 2.0\)\) must be three numbers in \[0, 1\]"),
        ("solarize_prob", -1, r"`solarize_prob` \(=-1.0\) must be in \[0, 1\]"),
        ("seed", -1, r"`seed` \(=-1\) must be in \[0, 2\^64\)"),
        ("seed", 2**64, r"`seed` \(=18446744073709551616\) must be in \[0, 2\^64\)"),
        ("out_dim", 1, r"`out_dim` \(=1\) must be at least 2"),
        ("student_temp", 1e-9, r"`student_temp` \(=1e-09\) must be at least 1e-05"),
        ("teacher_temp_warmup", 0, r"`teacher_temp_warmup` \(=0.0\) must be at least 1e-05"),
        ("lr", 0, r"`lr` \(=0.0\) must be positive"),
        ("global_scale", 0.4, r"`global_scale` \(=0.4\) must be 2 numbers"),
        ("blur_prob", [1, 0.5], r"`blur_prob` \(=\[1, 0.5\]\) must be 3 numbers"),
        ("schedule_stretch", 0.5, r"`schedule_stretch` \(=0.5\) must be at least 1"),
        ("ibot", 3, r"`ibot` \(=3\) must be null or hold `field: value` lines"),
        ("centering", "none", r"`centering` \(=none\) must be 'logit' or 'probability' with `method` \(='dino'\)"),
        ("method", "ibot", r"`ibot` \(=None\) must hold that method's settings with `method` \(='ibot'\)"),
        ("batch_size", 0, r"`batch_size` \(=0\) must be at least 1"),
        ("patch_size", 0, r"`patch_size` \(=0\) must be at least 1"),
        ("weight_decay", -0.1, r"`weight_decay` \(=-0.1\) must be at least 0"),
        ("momentum_teacher", 1.5, r"`momentum_teacher` \(=1.5\) must be in \[0, 1\]"),
        ("drop_path", 1.0, r"`drop_path` \(=1.0\) must be in \[0, 1\)"),
        ("image_size", 31, r"`image_size` \(=31\) must be a multiple of `patch_size` \(=8\)"),
        ("hidden_size", 66, r"`hidden_size` \(=66\) must be a multiple of `num_attention_heads` \(=4\)"),
        ("warmup_epochs", 999, r"`warmup_epochs` \(=999\) must be at most `epochs` \(=\d+\)"),
        ("prototype_koleo_weight", -0.1, r"`prototype_koleo_weight` \(=-0.1\) must be at least 0"),
        ("online_em", EM | {"rows_per_prototype": 0}, r"`online_em.rows_per_prototype` \(=0.0\) must be positive"),
        ("online_em", EM | {"max_kappa": -1}, r"`online_em.max_kappa` \(=-1.0\) must be positive"),
        ("online_em", EM | {"median_kappa": -1}, r"`online_em.median_kappa` \(=-1.0\) must be at least 0"),
    ],
)
def test_bad_values_name_the_field_the_value_and_what_is_allowed(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("photos_dino_vmf", {field: value})


def test_prototypes_of_an_online_em_have_no_regulariser() -> None:
    with pytest.raises(ValueError, match=r"`prototype_koleo_weight` \(=0.1\) must be 0 with `online_em`"):
        load_recipe("photos_dino_vmf", {"online_em": EM, "prototype_koleo_weight": 0.1})


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("ibot", "method", "dino", r"`ibot` must be null with `method` \(='dino'\)"),
        (
            "ibot",
            "ibot.mask_ratio",
            [0.5, 0.1],
            r"`ibot.mask_ratio` \(=\(0.5, 0.1\)\) must be \(low, high\) with 0 <= low",
        ),
        ("ibot", "ibot.mask_probability", 1.5, r"`ibot.mask_probability` \(=1.5\) must be in \[0, 1\]"),
        ("ibot", "ibot.shared_head", "yes", r"`ibot.shared_head` \(='yes'\) must be of type bool"),
        (
            "ibot",
            "ibot.patch_out_dim",
            64,
            r"`ibot.patch_out_dim` \(=64\) must be `out_dim` \(=128\) with a shared head",
        ),
        (
            "ibot",
            "ibot.mask_start_epoch",
            12,
            r"`teacher_temp_warmup_epochs` \(=5\) must be at most `epochs` \(=16\) - `ibot",
        ),
        ("ibot", "ibot.patch_out_dim", 1, r"`ibot.patch_out_dim` \(=1\) must be at least 2"),
        ("ibot", "ibot.patch_teacher_temp", 1e-9, r"`ibot.patch_teacher_temp` \(=1e-09\) must be at least 1e-05"),
        ("ibot", "ibot.cls_weight", float("inf"), r"`ibot.cls_weight` \(=inf\) must be a finite number"),
        ("ibot", "ibot.cls_weight", 0, r"`ibot.cls_weight` \(=0.0\) must be positive"),
        ("msn", "msn.patch_drop", 1, r"`msn.patch_drop` \(=1.0\) must be in \[0, 1\)"),
        ("msn", "msn.rand_views", 0, r"`msn.rand_views` \(=0\) must be at least 1"),
        ("msn", "msn.me_max_weight", -1, r"`msn.me_max_weight` \(=-1.0\) must be at least 0"),
        ("msn", "centering", "logit", r"`centering` \(=logit\) must be 'none' with `method` \(='msn'\)"),
        ("msn", "normalization", "none", r"`normalization` \(=none\) must be 'l2' or 'vmf' with `method` \(='msn'\)"),
        ("msn", "fused_loss", True, r"`fused_loss` \(=True\) must be false with `method` \(='msn'\)"),
        ("msn", "msn", None, r"`msn` \(=None\) must hold that method's settings"),
        ("msn", "prototype_koleo_weight", 0.1, r"`prototype_koleo_weight` \(=0.1\) must be 0 with `method` \(='msn'\)"),
        ("msn", "online_em", EM, r"`online_em` must be null with `method` \(='msn'\): only DINO's"),
        ("ibot", "online_em", EM, r"`online_em` must be null with `method` \(='ibot'\): only DINO's"),
        ("dino", "online_em", EM, r"`normalization` \(=none\) must be 'vmf' with `online_em`, whose prototypes are"),
    ],
)
def test_a_methods_own_settings_are_checked_too(name: str, field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(f"photos_{name}", {field: value})
