"""What pretrain.py tells somebody who does not know it yet: recipes, fields, sizes that fit."""

import dataclasses
import re

import pytest

import pretrain
from config.cards import read_card, recipe_list
from config.explain import explain, fields
from config.methods import IBOTSettings, MSNSettings
from config.options import Options
from config.prototypes import OnlineEMSettings
from config.recipe import RECIPES, Recipe, load_recipe
from config.sizes import check_sizes, nearest_multiple, sizes_for

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def test_every_recipe_is_listed_with_what_it_is_for_and_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    pretrain.main(Options(list_recipes=True))
    listed = capsys.readouterr().out
    assert [line for line in listed.splitlines() if line in NAMES] == NAMES
    one = listed[listed.index("\nphotos_dino_vmf\n") :].splitlines()[2:6]
    assert one[0].strip() == "DINO-vMF on photos, 32 px"
    assert one[1].strip().startswith("A small ViT with DINO-vMF on the photograph cells")
    assert re.fullmatch(r" +Time: \d+ s of CPU time .*", one[3])
    assert "DINO on a folder of images (--data), 224 px" in listed
    assert listed.count("Time: ") == len(NAMES)
    assert recipe_list() in listed


@pytest.mark.parametrize("name", NAMES)
def test_a_card_has_a_purpose_and_its_entries_are_whole(name: str) -> None:
    card = read_card(RECIPES / f"{name}.yaml")
    assert card.purpose.endswith(".")
    assert {"Paper", "Command", "Hardware", "Expect"} <= card.entries.keys()
    assert f"--recipe {name} " in card.entries["Command"]
    assert "#" not in "".join(card.entries.values())


def test_every_field_is_explained_by_the_comment_beside_it() -> None:
    found = fields()
    sections = {"ibot": IBOTSettings, "msn": MSNSettings, "online_em": OnlineEMSettings}
    own = {f"{name}.{field.name}" for name, section in sections.items() for field in dataclasses.fields(section)}
    assert set(found) == {field.name for field in dataclasses.fields(Recipe)} | own
    assert [name for name, field in found.items() if not field.meaning] == []
    source = "".join(
        (RECIPES.parent / "config" / f"{name}.py").read_text() for name in ("recipe", "methods", "prototypes")
    )
    for name, field in found.items():
        assert f"{name.rpartition('.')[2]}: {field.kind}  # {field.meaning}\n" in source.replace('"', "'"), name


def test_a_field_with_its_value_in_a_recipe_and_in_all(capsys: pytest.CaptureFixture[str]) -> None:
    pretrain.main(Options("photos_dino_vmf", explain="lr"))
    assert capsys.readouterr().out.splitlines() == [
        "lr: float",
        "  peak for a batch of 256; the peak used is lr * batch_size / 256",
        "  Group: Optimisation.",
        "  In photos_dino_vmf: 0.008",
    ]
    assert "\n  0.15 in imagenet_vits16_msn, imagenet_vits16_msn_vmf, photos_msn, photos_msn_vmf" in explain(
        "msn.patch_drop"
    )
    assert explain("ibot", "photos_ibot").count("ibot.mask_ratio=(0.1, 0.5)") == 1
    with pytest.raises(ValueError, match=r"`explain` \(='learning_rte'\) must be a field of a recipe: "):
        explain("learning_rte")
    with pytest.raises(ValueError, match=r"`explain` \(='mask_ratio'\) must be a field of a recipe: .*ibot.mask_ratio"):
        explain("mask_ratio")


@pytest.mark.parametrize(("image", "local", "patch"), [(30, 16, 8), (28, 16, 8), (32, 20, 8), (7, 3, 4)])
def test_sizes_that_do_not_fit_name_some_that_do(image: int, local: int, patch: int) -> None:
    with pytest.raises(ValueError, match=r"must be a multiple of `patch_size`") as caught:
        check_sizes(image, local, patch)
    message = str(caught.value)
    if suggested := re.search(r"--set image_size=(\d+) patch_size=(\d+) local_size=(\d+)", message):
        sizes = [int(number) for number in suggested.groups()]
        check_sizes(sizes[0], sizes[2], sizes[1])
        assert sizes[0] == image
    name, *sides = re.findall(r"with patch_size=\d+, (\w+) may be (\d+)(?: or (\d+))?", message)[0]
    assert all(int(side) % patch == 0 for side in sides if side)
    assert name == ("image_size" if image % patch else "local_size")


def test_the_error_of_a_recipe_in_full() -> None:
    message = (
        r"`image_size` \(=30\) must be a multiple of `patch_size` \(=8\): with image_size=30, patch_size may be 5, 6 "
        r"or 10, for example --set image_size=30 patch_size=10 local_size=20; with patch_size=8, image_size may be "
        "24 or 32$"
    )
    with pytest.raises(ValueError, match=message):
        load_recipe("photos_dino_vmf", {"image_size": 30})
    with pytest.raises(ValueError, match=r"\(=8\): with patch_size=8, image_size may be 24 or 32$"):
        load_recipe("photos_dino_vmf", {"image_size": 31})


@pytest.mark.parametrize("side", [8, 28, 32, 64, 100, 224, 1000])
def test_sizes_to_begin_with_fit(side: int) -> None:
    sizes = sizes_for(side)
    check_sizes(**sizes)
    assert 4 <= sizes["image_size"] / sizes["patch_size"] <= 14 or side < 16
    assert [nearest_multiple(size, 8) for size in (1, 12, 13, 20)] == [8, 8, 16, 16]


def test_a_command_without_what_it_needs_says_so(tmp_path: pytest.TempPathFactory) -> None:
    with pytest.raises(ValueError, match=r"`output` \(=None\) must be the folder of the run"):
        pretrain.main(Options("photos_dino_vmf"))
    with pytest.raises(ValueError, match=r"`recipe` \(=None\) must be one that --list-recipes prints"):
        pretrain.main(Options(output=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
