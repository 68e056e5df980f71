"""neighbours.py: the nearest train images are those of the largest cosine, drawn in their places."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

import neighbours
from config.recipe import load_recipe
from data.augment import EvalTransform
from data.files import open_rgb
from data.source.kept import Source, keep_source
from methods.registry import build_method
from reporting.pictures import BETWEEN, FRAME, LINE, TILE, Tile, contact_sheet
from training.run import load_run, save_checkpoint

TINY = {
    **{"dataset": "folder", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8},
    **{"image_size": 16, "local_size": 8, "out_dim": 12, "hidden_dim": 16, "bottleneck_dim": 8, "num_workers": 0},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained run on 2 classes of 6 train and 3 val images; the first train file is no image."""
    root = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name in ("a", "b"):
            (root / "images" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "images" / split / name / f"{index}.png")
    (root / "images/train/a/0.png").write_text("no image")
    recipe = load_recipe("photos_dino_vmf", TINY)
    (root / "mine").mkdir()
    state = {"recipe": recipe, "method": build_method(recipe).state_dict(), "step": 1, "epoch": 0}
    save_checkpoint(root / "mine", state)
    keep_source(root / "mine", Source(root / "images"))
    return root / "mine"


def names_of_nearest(run: Path, query: Path, *, pixels: bool = False) -> list[str]:
    """CLASS/FILE of all train images, those of the largest cosine first, by the definition of the cosine."""
    files = [path for path in sorted((run.parent / "images/train").glob("*/*")) if path.read_bytes() != b"no image"]
    transform, backbone = EvalTransform(16), load_run(run).backbone
    with torch.no_grad():
        x = torch.stack([transform(open_rgb(path)) for path in (query, *files)])
        y = x.flatten(1) if pixels else backbone(x).last_hidden_state[:, 0]
    cosines = [torch.dot(y[0], row) / (y[0].norm() * row.norm()) for row in y[1:]]
    order = np.argsort([-float(cosine) for cosine in cosines])
    return [f"{files[index].parent.name}/{files[index].name}" for index in order]


def test_the_neighbours_of_named_files(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    queries = [run.parent / "images/val/a/0.png", run.parent / "images/val/b/2.png"]
    neighbours.main(run, tuple(queries), count=11, output=tmp_path / "new" / "sheet.png")
    printed = capsys.readouterr().out.splitlines()
    for line, query in zip(printed, queries, strict=False):
        assert line == f"{query.name}: {', '.join(names_of_nearest(run, query))}"
    assert printed[2:] == [f"picture: {tmp_path / 'new' / 'sheet.png'}"]  # no classes, so nothing is counted
    sheet = np.asarray(open_rgb(tmp_path / "new" / "sheet.png"))
    for number, query in enumerate(queries):
        tiles = [query]
        for pixels in (False, True):
            names = names_of_nearest(run, query, pixels=pixels)
            tiles += [run.parent / "images/train" / name for name in names]
        found = tiles_in(sheet, number)
        assert [np.asarray(open_rgb(path)).tolist() for path in tiles] == found


def tiles_in(sheet: np.ndarray, row: int) -> list[list]:
    """The 16 px images in a row of the sheet, read from left to right: where it is not white, in steps of a tile."""
    top = LINE + row * (TILE + BETWEEN)
    band = sheet[top : top + TILE]
    left = int(np.flatnonzero((band[0] != 255).any(axis=1))[0])  # labels stand in the middle of a row, not at its top
    found, middle = [], ((np.arange(16) + 0.5) * TILE / 16).astype(int)
    while left + TILE <= sheet.shape[1]:
        if (band[0, left] == 255).all():
            left += 1
            continue
        found.append(band[:, left : left + TILE][middle][:, middle].tolist())
        left += TILE
    return found


def test_without_queries_there_is_one_of_each_class(run: Path, capsys: pytest.CaptureFixture) -> None:
    neighbours.main(run, count=3)
    first, second, ours, pixels, picture = capsys.readouterr().out.splitlines()
    named = []
    for name, line in zip("ab", (first, second), strict=True):
        query, _, rest = line.partition(": ")
        assert query.split("/")[0] == name
        named += [neighbour.split("/")[0] == name for neighbour in rest.split(", ")]
        assert rest == ", ".join(names_of_nearest(run, run.parent / "images/val" / query)[:3])
    assert 0 < sum(named) < 6
    assert ours == f"mine: {sum(named)} of 6 neighbours are of their query's class"
    assert pixels.startswith("raw pixels: ")
    others = 12 - sum(named) - int(pixels.split()[2])
    assert picture == f"picture: {run / 'neighbours.png'}"
    sheet = np.asarray(open_rgb(run / "neighbours.png"))
    framed = (sheet == ImageColor.getrgb(FRAME)).all(axis=-1).sum()
    assert framed == others * (TILE**2 - (TILE - 6) ** 2)


def test_a_row_of_the_sheet_keeps_shapes() -> None:
    wide = Image.new("RGB", (2 * TILE, TILE), "blue")
    sheet = contact_sheet(["one", "two"], [("wide", [[Tile(wide)], [Tile(wide, framed=True)]])])
    blue = (np.asarray(sheet) == (0, 0, 255)).all(axis=-1)
    assert blue.sum() == TILE * TILE // 2 + (TILE - 6) * TILE // 2
    assert not blue[: LINE + TILE // 4].any()


def test_what_cannot_be_asked(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"`run` \(='.*'\) must be an output directory of pretrain.py with a ch"
    ):
        neighbours.main(tmp_path)
    for count in (0, 12):
        with pytest.raises(ValueError, match=rf"`count` \(={count}\) must be in 1 ... 11, the number of images that"):
            neighbours.main(run, count=count)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(OSError, match=r"cannot read the image '.*text\.png'"):
        neighbours.main(run, (tmp_path / "text.png",))
