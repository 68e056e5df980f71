"""The CPU recipes start with the losses they had when `python tests/golden.py` last ran."""

import json

import pytest

import golden


def test_every_photo_recipe_has_golden_losses():
    assert list(json.loads(golden.FILE.read_text())) == golden.RECIPES


# One machine repeats them to 1e-6. Other processors and versions of PyTorch round differently, and AdamW divides by the
# size of gradients that may be rounding alone; a changed setting shows in the second digit.
@pytest.mark.parametrize("recipe", golden.RECIPES)
def test_the_first_losses_are_the_golden_ones(recipe, tmp_path):
    expected = json.loads(golden.FILE.read_text())[recipe]
    for name, values in golden.first_steps(recipe, tmp_path / "run").items():
        assert values == pytest.approx(expected[name], rel=1e-4 if name == "loss" else 1e-3), name
