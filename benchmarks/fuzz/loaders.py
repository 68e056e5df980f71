"""Everything in examples/vit_ssl that reads a file: a small valid file for each reader, and how it is read."""

import contextlib
import dataclasses
import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTModel

from backbones.public_checkpoints import open_public_checkpoint
from config.recipe import RECIPES, load_recipe
from data.files import open_rgb
from data.images import load_images
from data.source.inventory import read_inventory, write_inventory
from evaluators.dense.video.davis import load_davis, read_annotation
from evaluators.features import feature_cache
from evaluators.features.encoder import open_encoder
from evaluators.features.extraction import Chunk
from evaluators.few_shot.splits import listed_sets
from evaluators.retrieval.landmarks import load_landmarks
from methods.registry import build_method
from storage.checksums import write_checksums
from storage.json_lines import append_rows, read_rows
from training.checkpoint_file import load_checkpoint, save_checkpoint

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}


@dataclasses.dataclass(frozen=True)
class Loader:
    """A reader of files.

    `write(folder)` writes what it reads into an empty folder, and returns the files that are to be damaged;
    `read(folder, path)` reads it, `path` being the file that was damaged. Where the format has checksums (`checked`),
    damage must be noticed or change nothing. `share` of the inputs is for slow readers. `names` are words that an
    error may have in place of the file's name.
    """

    name: str
    write: Callable[[Path], list[Path]]
    read: Callable[[Path, Path], Any]
    checked: bool = False
    share: float = 1.0
    names: tuple[str, ...] = ()


def _write_checkpoint(folder: Path) -> list[Path]:
    sizes = {"image_size": 16, "local_size": 8, "out_dim": 8, "hidden_dim": 8, "bottleneck_dim": 4}
    recipe = load_recipe("photos_dino_vmf", SMALL | sizes)
    method = build_method(recipe)
    optimizer = torch.optim.AdamW(method.student.parameters()).state_dict()
    state = {"method": method.state_dict(), "optimizer": optimizer, "step": 7, "epoch": 1, "images": 64, "seconds": 0.5}
    save_checkpoint(folder, {"recipe": recipe, **state})
    return [folder / "checkpoint.pt"]


def original_weights() -> dict[str, torch.Tensor]:
    """A state dict with the names and shapes of DINO's VisionTransformer, of one block and width 8."""
    shapes = {"patch_embed.proj": (8, 3, 8, 8), "norm": (8,), "blocks.0.norm1": (8,), "blocks.0.norm2": (8,)}
    shapes |= {"blocks.0.attn.qkv": (24, 8), "blocks.0.attn.proj": (8, 8)}
    shapes |= {"blocks.0.mlp.fc1": (32, 8), "blocks.0.mlp.fc2": (8, 32)}
    weights = {"cls_token": torch.randn(1, 1, 8), "pos_embed": torch.randn(1, 5, 8)}
    for name, shape in shapes.items():
        weights |= {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[0])}
    return weights


def _write_original(*, old: bool) -> Callable[[Path], list[Path]]:
    def write(folder: Path) -> list[Path]:
        path = folder / "original.pth"
        content = {"teacher": original_weights(), "epoch": 3, "lr": np.float64(0.1)}
        torch.save(content, path, _use_new_zipfile_serialization=not old)
        return [path]

    return write


def _write_images(folder: Path) -> list[Path]:
    noise = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
    picture = Image.fromarray(noise)
    for suffix in ("png", "jpg", "gif", "tif", "webp", "bmp"):
        picture.save(folder / f"image.{suffix}")
    picture.save(folder / "deflated.tif", compression="tiff_deflate")
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "turned.jpg", exif=exif)
    return sorted(folder.iterdir())


def _class_folders(top: Path) -> None:
    for name in ("cat", "dog"):
        (top / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8), (number, 0, 255)).save(top / name / f"{name}_{number}.png")


def _write_splits(folder: Path) -> list[Path]:
    _class_folders(folder / "images" / "train")
    (folder / "splits").mkdir()
    (folder / "splits" / "2imgs_class.txt").write_text("cat_0.png\ncat_1.png\ndog_0.png\ndog/dog_2.png\n")
    return [folder / "splits" / "2imgs_class.txt"]


def _read_splits(folder: Path, _: Path) -> Any:
    images = load_images("folder", "train", data=folder / "images")
    return listed_sets(folder / "splits", images)


def _write_landmarks(folder: Path) -> list[Path]:
    jpg = folder / "roxford5k" / "jpg"
    jpg.mkdir(parents=True)
    names = [f"all_souls_{number:06}" for number in range(5)]
    for name in names:
        Image.new("RGB", (8, 8)).save(jpg / f"{name}.jpg")
    relation = {"bbx": [1.0, 1.0, 7.0, 6.5], "easy": np.array([0]), "hard": np.array([1, 2]), "junk": np.array([3])}
    content = {"imlist": names[:4], "qimlist": names[4:], "gnd": [relation]}
    path = folder / "roxford5k" / "gnd_roxford5k.pkl"
    path.write_bytes(pickle.dumps(content, protocol=2))
    return [path]


def _read_landmarks(folder: Path, _: Path) -> Any:
    found = load_landmarks(folder, "roxford5k")
    for path in (*found.images, *(query.image for query in found.queries)):
        open_rgb(path)


def _write_davis(folder: Path) -> list[Path]:
    for name in ("bear", "cow"):
        for kind, suffix, mode in (("JPEGImages", "jpg", "RGB"), ("Annotations", "png", "P")):
            (folder / kind / "480p" / name).mkdir(parents=True)
            for frame in range(3):
                Image.new(mode, (8, 8)).save(folder / kind / "480p" / name / f"{frame:05}.{suffix}")
    path = folder / "ImageSets" / "2017" / "val.txt"
    path.parent.mkdir(parents=True)
    path.write_text("bear\ncow\n")
    return [path]


def _read_davis(folder: Path, _: Path) -> Any:
    for video in load_davis(folder):
        for frame, annotation in zip(video.frames, video.annotations, strict=True):
            open_rgb(frame)
            read_annotation(annotation)


def _write_recipe(folder: Path) -> list[Path]:
    shutil.copy(RECIPES / "photos_ibot_vmf.yaml", folder / "recipe.yaml")
    return [folder / "recipe.yaml"]


def _write_rows(folder: Path) -> list[Path]:
    append_rows(folder / "results.jsonl", [{"protocol": "knn", "value": 0.5 + k, "k": k} for k in range(5)])
    return [folder / "results.jsonl"]


def _write_features(folder: Path) -> list[Path]:
    chunk = Chunk(np.random.default_rng(0).random((9, 4), np.float32), np.ones(9, bool), [])
    feature_cache.store(folder / "val-cls-0", [chunk], np.arange(9) % 2, ["cat", "dog"])
    return sorted((folder / "val-cls-0").iterdir())


def _read_features(folder: Path, _: Path) -> Any:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        if feature_cache.is_whole(folder / "val-cls-0"):
            features, errors = feature_cache.load(folder / "val-cls-0")
            return *features, errors
    raise ValueError(said.getvalue())  # features are made again where damage was noticed


def _write_backbone(*, checksums: bool) -> Callable[[Path], list[Path]]:
    def write(folder: Path) -> list[Path]:
        config = ViTConfig(**SMALL, intermediate_size=16)
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder / "backbone")
        if checksums:
            write_checksums(folder / "backbone")
        return sorted((folder / "backbone").iterdir())

    return write


def _write_inventory(folder: Path) -> list[Path]:
    write_inventory(folder, {f"cat/{number}.png": str(70 + number) for number in range(40)})
    return [folder / "images.txt.gz"]


def _write_parquet(folder: Path) -> list[Path]:
    import datasets

    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["even", "odd"])})
    items = [{"bytes": file.getvalue(), "path": f"{number}.png"} for number in range(4)]
    (folder / "set" / "data").mkdir(parents=True)
    path = folder / "set" / "data" / "train-00000-of-00001.parquet"
    datasets.Dataset.from_dict({"picture": items, "kind": [0, 1, 0, 1]}, features=features).to_parquet(path)
    return [path]


def _read_parquet(folder: Path, _: Path) -> Any:
    images = load_images("hub", "train", data=folder / "set")
    return [np.asarray(images[index][0]) for index in range(len(images))]


def _read_stream(folder: Path, _: Path) -> Any:
    from data.stream import ImageStream, StreamedViews

    stream = ImageStream(str(folder / "set"), images=4)
    numbers = {"seed": 0, "epoch": 0, "batch_size": 4, "first": 0, "last": 1, "rank": 0, "world_size": 1}
    return list(StreamedViews(stream, lambda image, rng: np.asarray(image), **numbers))


LOADERS = (
    Loader("checkpoint.pt", _write_checkpoint, lambda folder, _: load_checkpoint(folder), checked=True),
    Loader(
        "original .pth",
        _write_original(old=False),
        lambda _, path: open_public_checkpoint(path, heads=2).state_dict(),
        checked=True,
    ),
    Loader(
        "original .pth of torch before 1.6",
        _write_original(old=True),
        lambda _, path: open_public_checkpoint(path, heads=2).state_dict(),
    ),
    Loader(
        "backbone/",
        _write_backbone(checksums=True),
        lambda folder, _: open_encoder(folder / "backbone").model.state_dict(),
        checked=True,
        share=0.2,
    ),
    Loader(
        "folder of AutoModel without checksums",
        _write_backbone(checksums=False),
        lambda folder, _: open_encoder(folder / "backbone").model.state_dict(),
        share=0.2,
    ),
    Loader("cached features", _write_features, _read_features, checked=True),
    Loader("images", _write_images, lambda _, path: open_rgb(path)),
    Loader("parquet", _write_parquet, _read_parquet, share=0.05, names=("image ",)),
    Loader("parquet as a stream", _write_parquet, _read_stream, share=0.05, names=("image ",)),
    Loader("retrieval ground truth", _write_landmarks, _read_landmarks),
    Loader("list of a split", _write_splits, _read_splits),
    Loader("list of DAVIS", _write_davis, _read_davis),
    Loader("recipe", _write_recipe, lambda _, path: load_recipe(path)),
    Loader("results.jsonl", _write_rows, lambda _, path: read_rows(path)),
    Loader("images.txt.gz", _write_inventory, lambda folder, _: read_inventory(folder), checked=True),
)
