"""Colour, blur and solarisation of batches: what PIL makes of one crop after the other with the same random numbers."""

import colorsys
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from config.recipe import load_recipe
from data import photometric
from data.images import load_photo
from data.loading import load_steps, training_images
from data.photometric import blur, changed, draw_changes, normalized, turn_hue
from training.step import to_device

ALL = {"grayscale_prob": 0.2, "blur_prob": 0.5, "solarize_prob": 0.2}
DINO = {"color_strength": 1.0, "saturation": 0.2, "blur_strength": 1.0, **ALL}
OTHER = {"color_strength": 2.0, "saturation": 0.4, "blur_strength": 2.5, **ALL}
NOTHING = {"color_strength": 0.0, "saturation": 0.2, "blur_strength": 0.0, **dict.fromkeys(ALL, 0.0)}


def crops(count: int, size: int = 24) -> Tensor:
    """Parts of photographs in colour."""
    rng, photos = random.Random(0), [load_photo(name) for name in ("astronaut.png", "coffee.png", "rocket.jpg")]
    found = []
    for number in range(count):
        photo = photos[number % 3]
        x, y = rng.randrange(photo.width - size), rng.randrange(photo.height - size)
        found.append(pixels(photo.crop((x, y, x + size, y + size))))
    return torch.stack(found)


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def levels(x: Tensor) -> Tensor:
    """From what is normalised to 0 to 255."""
    black, white = normalized(torch.tensor([0.0, 255.0]).expand(3, 1, 2)).split(1, dim=2)
    return 255 * (x - black) / (white - black)


def by_pil(crop: Tensor, rng: random.Random, settings: dict[str, float]) -> Tensor:
    """The changes as DINO makes them, with PIL, in the order in which `draw_changes` draws them."""
    image = Image.fromarray(crop.permute(1, 2, 0).numpy())
    strength = settings["color_strength"]
    if strength and rng.random() < 0.8:
        steps = [(ImageEnhance.Brightness, 0.4), (ImageEnhance.Contrast, 0.4)]
        steps += [(ImageEnhance.Color, settings["saturation"]), (None, 0.1)]
        rng.shuffle(steps)
        for enhance, largest in steps:
            amount = strength * rng.uniform(-largest, largest)
            if enhance is None:
                hue, saturation, value = image.convert("HSV").split()
                hue = Image.fromarray(np.asarray(hue) + np.uint8(round(amount * 256) % 256))
                image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
            else:
                image = enhance(image).enhance(1 + amount)
    if rng.random() < settings["grayscale_prob"]:
        image = image.convert("L").convert("RGB")
    if settings["blur_strength"] and rng.random() < settings["blur_prob"]:
        image = image.filter(ImageFilter.GaussianBlur(settings["blur_strength"] * rng.uniform(0.1, 2.0)))
    if rng.random() < settings["solarize_prob"]:
        image = ImageOps.solarize(image, 128)
    return pixels(image).float()


def drawn(count: int, settings: dict[str, float]) -> Tensor:
    return torch.stack([draw_changes(random.Random(seed), **settings) for seed in range(count)])


@pytest.mark.parametrize("settings", [DINO, OTHER])
def test_the_changes_are_those_of_pil(settings: dict[str, float]) -> None:
    x = crops(150)
    found = levels(changed(x, drawn(len(x), settings)))
    expected = torch.stack([by_pil(crop, random.Random(seed), settings) for seed, crop in enumerate(x)])
    wrong = (found - expected).abs().mean((1, 2, 3))
    assert wrong.max() < 5  # PIL cuts off what is behind the point after each step, and has 256 hues
    assert wrong.mean() < 1.5
    assert (found.mean((2, 3)) - expected.mean((2, 3))).mean(0).abs().max() < 1.3
    ours, theirs = (y.flatten().quantile(torch.linspace(0.05, 0.95, 7)) for y in (found, expected))
    torch.testing.assert_close(ours, theirs, atol=2.5, rtol=0)
    assert (expected - x).abs().mean() > 15  # there was something to do


def test_the_hue_of_hsv_turns_and_nothing_else() -> None:
    corners = torch.tensor([[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)])
    generator = torch.Generator().manual_seed(0)
    colors = torch.cat([corners, torch.randint(256, (60, 3), generator=generator), torch.full((1, 3), 7)]).float()
    x = colors.T[None, :, None].expand(6, 3, 1, len(colors)).contiguous()
    amounts = torch.tensor([0.0, 0.1, -0.1, 1 / 3, 0.5, -0.37])
    turned = turn_hue(x, amounts)
    for amount, found in zip(amounts.tolist(), turned, strict=True):
        for color, pixel in zip(colors.tolist(), found[:, 0].T.tolist(), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*color)
            assert pixel == pytest.approx(colorsys.hsv_to_rgb((hue + amount) % 1, saturation, value), abs=2e-3)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.4, 1.5, 2.0, 5.0])
def test_the_blur_is_that_of_pil_up_to_the_borders(sigma: float) -> None:
    point = torch.zeros(1, 1, 41, 41)
    point[..., 20, 20] = 1
    spread = blur(point, torch.tensor([sigma]))[0, 0]
    at = torch.arange(41.0) - 20
    torch.testing.assert_close(spread.sum(0) @ at**2, torch.tensor(sigma**2), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(spread, spread.T)
    x = crops(6, 20)
    images = [Image.fromarray(crop.permute(1, 2, 0).numpy()) for crop in x]
    expected = torch.stack([pixels(image.filter(ImageFilter.GaussianBlur(sigma))) for image in images])
    assert (blur(x.float(), torch.full((6,), sigma)) - expected).abs().max() < 4  # PIL rounds six times


def test_brightness_is_drawn_from_dinos_range() -> None:
    # On one grey, contrast, saturation and hue do nothing: what remains is the brightness factor.
    flat, only = torch.full((300, 3, 4, 4), 100, dtype=torch.uint8), {**NOTHING, "color_strength": 1.0}
    found = levels(changed(flat, drawn(300, only)))[:, 0, 0, 0]
    assert 60 - 1e-3 <= found.min() < 63
    assert 137 < found.max() <= 140 + 1e-3
    assert 30 < (found == found.median()).sum() < 90  # a fifth keeps its colours
    halved = levels(changed(flat, drawn(300, {**only, "color_strength": 0.5})))
    assert 80 - 1e-3 <= halved.min() < 82
    assert 118 < halved.max() <= 120 + 1e-3


def test_without_changes_the_pixels_stay() -> None:
    x = crops(3)
    assert torch.equal(changed(x, drawn(3, NOTHING)), normalized(x))


def test_neighbours_in_a_batch_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, changes = crops(20), drawn(20, DINO)
    together = changed(x, changes)
    alone = torch.cat([changed(x[row : row + 1], changes[row : row + 1]) for row in range(20)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    monkeypatch.setattr(photometric, "_IN_CACHE", 3 * x[0].numel())
    torch.testing.assert_close(changed(x, changes), together, rtol=0, atol=1e-5)


def test_crops_are_the_same_wherever_they_are_finished(tmp_path) -> None:
    batches = []
    for place in ("cpu", "device"):
        options = {"batch_size": 8, "augment_on": place, "blur_strength": 1.0, "solarize_prob": 0.5}
        recipe = load_recipe("photos_ibot", options)
        images = training_images(recipe, None, None)
        (batch,) = next(load_steps(images, recipe, 1, 0, 1, tmp_path, accumulate=1, num_workers=0))
        assert batch["crops"][0].dtype == (torch.float32 if place == "cpu" else torch.uint8)
        batches.append(to_device(batch))
    assert batches[0].keys() == batches[1].keys() == {"crops", "masks"}
    assert [crop.shape for crop in batches[1]["crops"]] == [(8, 3, 32, 32)] * 2 + [(8, 3, 16, 16)] * 2
    torch.testing.assert_close(batches[1], batches[0], rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_same_changes() -> None:
    x, changes = crops(40), drawn(40, DINO)
    torch.testing.assert_close(changed(x.cuda(), changes).cpu(), changed(x, changes), rtol=0, atol=1e-3)
