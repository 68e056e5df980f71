"""A pretraining recipe: every setting of a run in one frozen dataclass, read from recipes/NAME.yaml."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

RECIPES = Path(__file__).parent / "recipes"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All settings of one pretraining run; there are no defaults, so a recipe file hides nothing.

    The names and meanings are those of DINO's command line (Caron et al., 2021). Raises ValueError when a value is
    out of range.
    """

    name: str
    method: Literal["dino"]
    dataset: Literal["photos", "digits", "folder"]
    seed: int
    num_workers: int  # data loading processes; changes the speed, never the result
    precision: Literal["auto", "float32", "bfloat16"]  # auto: bfloat16 autocast on CUDA, float32 elsewhere
    save_every: int  # epochs between checkpoints; one is also written at the end and on SIGTERM or SIGINT

    # Multi-crop: two global views and `num_local_crops` local ones; scales are shares of the image's area.
    image_size: int  # pixels of a global crop, and of an image at evaluation
    local_size: int  # pixels of a local crop
    num_local_crops: int
    global_scale: tuple[float, float]
    local_scale: tuple[float, float]
    color_strength: float  # 1: the colour jitter of DINO and BYOL; 0: none
    blur_strength: float  # 1: the Gaussian blur radii of DINO, meant for 224 pixels; 0: none
    solarize_prob: float  # of the second global view; DINO 0.2
    grayscale_prob: float  # of every view; DINO 0.2

    # Backbone: a transformers ViTModel.
    patch_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    initializer_range: float  # standard deviation of the initial weights, also of the head's MLP; DINO 0.02
    drop_path: float  # stochastic depth of the student's last layer, rising linearly from 0 at the first

    # Projection head and prototypes.
    normalization: Literal["none", "l2", "vmf"]  # of the prototypes, Table 1
    out_dim: int  # prototypes, K
    hidden_dim: int
    bottleneck_dim: int
    head_layers: int
    use_bn_in_head: bool

    # Loss.
    centering: Literal["logit", "probability"]  # Eq. 8 or Eq. 9
    center_momentum: float
    student_temp: float
    teacher_temp_warmup: float
    teacher_temp: float
    teacher_temp_warmup_epochs: int

    # Optimisation.
    epochs: int
    batch_size: int  # images per step, over all processes
    lr: float  # peak for a batch of 256; the peak used is lr * batch_size / 256
    min_lr: float  # at the last step, not scaled
    warmup_epochs: int
    weight_decay: float
    weight_decay_end: float
    momentum_teacher: float  # of the EMA teacher, rising to 1 on a cosine
    freeze_last_layer_epochs: int
    clip_grad: float  # largest gradient norm of each parameter; 0: no clipping

    def __post_init__(self) -> None:
        for names, allowed, is_allowed in _RANGES:
            self._check(names, allowed, is_allowed)
        whole_patches = f"a multiple of `patch_size` (={self.patch_size})"
        self._check(("image_size", "local_size"), whole_patches, lambda size: size % self.patch_size == 0)
        whole_heads = f"a multiple of `num_attention_heads` (={self.num_attention_heads})"
        self._check(("hidden_size",), whole_heads, lambda size: size % self.num_attention_heads == 0)
        within = f"at most `epochs` (={self.epochs})"
        self._check(("warmup_epochs", "teacher_temp_warmup_epochs"), within, lambda epochs: epochs <= self.epochs)

    def _check(self, names: Iterable[str], allowed: str, is_allowed: Callable[[Any], bool]) -> None:
        for name in names:
            if not is_allowed(getattr(self, name)):
                raise ValueError(f"`{name}` (={getattr(self, name)}) must be {allowed}")


_COUNTS = ("epochs", "batch_size", "save_every", "num_hidden_layers", "out_dim", "hidden_dim", "bottleneck_dim")
_SIZES = ("image_size", "local_size", "patch_size", "hidden_size", "num_attention_heads", "head_layers")
_NOT_NEGATIVE = ("seed", "num_workers", "num_local_crops", "warmup_epochs", "freeze_last_layer_epochs", "min_lr")
_NOT_NEGATIVE += ("teacher_temp_warmup_epochs", "weight_decay", "weight_decay_end", "clip_grad")
_RANGES: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (_COUNTS + _SIZES, "at least 1", lambda value: value >= 1),
    (_NOT_NEGATIVE, "at least 0", lambda value: value >= 0),
    (("lr", "initializer_range", "student_temp", "teacher_temp", "teacher_temp_warmup"), "positive", lambda x: x > 0),
    (("momentum_teacher", "center_momentum"), "in [0, 1]", lambda value: 0 <= value <= 1),
    (("drop_path",), "in [0, 1)", lambda value: 0 <= value < 1),
)


def load_recipe(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read recipes/NAME.yaml, or the file at a path, with some fields replaced.

    Raises FileNotFoundError naming the recipes there are, and ValueError for missing, unknown or mistyped fields.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise FileNotFoundError(f"no recipe `{name_or_path}`: expected the path of a .yaml file or one of {known}")
    settings = yaml.safe_load(path.read_text())
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold `field: value` lines")
    return recipe_from_dict({**settings, **(overrides or {})}, source=path.name)


def recipe_from_dict(settings: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """The recipe with these settings; every field must be there, with a value of the field's type."""
    types = typing.get_type_hints(Recipe)
    if unknown := sorted(settings.keys() - types.keys()):
        raise ValueError(f"{source}: unknown fields {', '.join(unknown)}; the fields are {', '.join(types)}")
    if missing := [name for name in types if name not in settings]:
        raise ValueError(f"{source}: missing fields {', '.join(missing)}")
    return Recipe(**{name: _typed(name, settings[name], kind) for name, kind in types.items()})


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write every setting; `load_recipe(path)` gives the same recipe."""
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(recipe).items()}
    path.write_text(yaml.safe_dump(settings, sort_keys=False))


def differences(requested: Recipe, saved: Recipe) -> list[str]:
    """One line for each field that makes the two recipes different runs (`num_workers` does not)."""
    pairs = [
        (name, getattr(requested, name), getattr(saved, name)) for name in vars(requested) if name != "num_workers"
    ]
    return [f"{name}: {there!r} in the run, {here!r} requested" for name, here, there in pairs if here != there]


def _typed(name: str, value: Any, kind: Any) -> Any:
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise ValueError(f"`{name}` (={value!r}) must be one of {', '.join(map(repr, typing.get_args(kind)))}")
        return value
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise ValueError(f"`{name}` (={value!r}) must be a pair of numbers")
        return tuple(_typed(name, item, float) for item in value)
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3, without a dot, as text
        except (TypeError, ValueError):
            pass
    elif type(value) is kind:
        return value
    raise ValueError(f"`{name}` (={value!r}) must be of type {kind.__name__}")
