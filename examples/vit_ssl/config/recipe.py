"""A pretraining recipe: every setting of a run in one frozen dataclass, read from recipes/NAME.yaml."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from config.backbone import check_backbone
from config.methods import IBOTSettings, MSNSettings
from config.prototypes import OnlineEMSettings, check_prototypes
from config.settings import (
    LOWEST_TEMPERATURE,
    Ranges,
    check_fields,
    check_ranges,
    flat,
    is_share,
    is_temperature,
    plain,
    read_settings,
)
from config.yaml_file import parse_yaml, read_yaml
from storage.whole_file import whole_file

RECIPES = Path(__file__).parents[1] / "recipes"
EARLIER = {"augment_on": "cpu", "backbone": "vit", "feature_grid": 1, "prototype_koleo_weight": 0.0, "online_em": None}
"""Fields that recipes and runs of earlier versions do not have, and what these were."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All settings of one pretraining run; there are no defaults, so a recipe file hides nothing.

    The names and meanings are those of DINO's command line (Caron et al., 2021). Raises ValueError when a value is
    out of range.
    """

    name: str  # what the run is called on the screen; the file of the recipe has the same name
    method: Literal["dino", "ibot", "msn"]  # the objective; with `normalization` vmf it is DINO-vMF, ...
    dataset: Literal["photos", "digits", "folder", "hub", "stream"]  # kind of image set; --data sets it by itself
    seed: int  # of initial weights, order of the images, crops and drop path
    num_workers: int  # data loading processes; changes the speed alone, or the order of a stream
    precision: Literal["auto", "float32", "bfloat16"]  # auto: bfloat16 autocast on CUDA, float32 elsewhere
    save_every: int  # epochs between checkpoints; one is also written at the end and on SIGTERM or SIGINT

    # Multi-crop: two global views and `num_local_crops` local ones; scales are shares of the image's area.
    image_size: int  # pixels of a global crop, and of an image at evaluation
    local_size: int  # pixels of a local crop
    num_local_crops: int  # local crops of each image, besides the global ones; DINO 8, MSN 10
    global_scale: tuple[float, float]  # least and largest share of the area in a global crop; DINO 0.4 to 1
    local_scale: tuple[float, float]  # the same of a local crop; DINO 0.05 to 0.4
    color_strength: float  # 1: the colour jitter of DINO and BYOL; 0: none
    saturation: float  # the jitter of the saturation at strength 1; DINO 0.2, MSN 0.4
    blur_strength: float  # 1: the Gaussian blur radii of DINO, meant for 224 pixels; 0: none
    blur_prob: tuple[float, float, float]  # of the first global view, the other global ones, the local ones
    solarize_prob: float  # of the global views but the first; DINO 0.2
    grayscale_prob: float  # of every view; DINO 0.2
    augment_on: Literal["cpu", "device"]  # where colour and blur of the crops are made; device: GPU, in batches

    # Backbone: a transformers ViTModel, or a ResNetModel of basic blocks; see methods/backbone.py.
    backbone: Literal["vit", "resnet"]  # a vision transformer or a convolutional network
    patch_size: int  # side in pixels of what a token stands for; of a ResNet, a position of its last feature map
    hidden_size: int  # width of the tokens; of a ResNet's last map, to which the width doubles from stage to stage
    num_hidden_layers: int  # blocks; the stages of a ResNet have equally many
    num_attention_heads: int  # without effect for a ResNet
    feature_grid: int  # a ResNet's features are means over so many by so many parts of its last map; of a ViT 1
    initializer_range: float  # standard deviation of the initial weights; DINO 0.02. Of a ResNet, the head's MLP alone
    drop_path: float  # stochastic depth of the student's last layer, rising linearly from 0 at the first; of a ViT

    # Projection head and prototypes.
    normalization: Literal["none", "l2", "vmf"]  # of the prototypes, Table 1; MSN's own is l2
    out_dim: int  # number of prototypes, K
    hidden_dim: int  # width of the hidden layers of the MLP in front of the prototypes; DINO 2048
    bottleneck_dim: int  # dimension p of the sphere on which features and prototypes lie; DINO 256
    head_layers: int  # linear layers of that MLP; DINO 3
    use_bn_in_head: bool  # whether that MLP has BatchNorm; DINO not for ViTs

    # Loss.
    centering: Literal["logit", "probability", "none"]  # Eq. 8, Eq. 9, or none, as in MSN, which has me-max instead
    center_on: Literal["responsibilities", "scores"]  # what Eq. 9 averages; without effect for other centres
    center_momentum: float  # of the centre, a moving average; without effect where there is none
    student_temp: float  # temperature of the student; DINO 0.1. The concentration of a prototype is its norm over it
    teacher_temp_warmup: float  # temperature of the teacher in the first epoch; DINO 0.04
    teacher_temp: float  # the one that it rises to, linearly; lower means sharper targets; DINO 0.04 to 0.07
    teacher_temp_warmup_epochs: int  # epochs that it rises for
    fused_loss: bool  # loss and gradients without the (N, K) logits: less memory, the same numbers to rounding
    prototype_koleo_weight: float  # of a term that keeps the prototypes' directions apart; experimental; 0: none

    # Optimisation.
    epochs: int  # how often every image is seen
    batch_size: int  # images per step, over all processes
    lr: float  # peak for a batch of 256; the peak used is lr * batch_size / 256
    min_lr: float  # learning rate at the last step, not scaled
    warmup_epochs: int  # epochs in which the learning rate rises to its peak, linearly; then it falls as a cosine
    warmup_start_lr: float  # learning rate at the first step, not scaled; DINO 0
    weight_decay: float  # at the first step; DINO 0.04
    weight_decay_end: float  # at the last step, with a cosine in between; DINO 0.4
    decay_prototypes: bool  # whether the weight decay is for prototypes, too; DINO and iBOT yes, MSN no
    norms_lr_multiplier: float  # of the prototypes' norms, which then do not decay; 0: as the prototypes, as in DINO
    momentum_teacher: float  # share of itself that the EMA teacher keeps at every step, rising to 1
    momentum_schedule: Literal["cosine", "linear"]  # how it rises; MSN linearly
    schedule_stretch: float  # lr, weight decay and momentum end after so many times `epochs`; DINO 1, MSN 1.25
    freeze_last_layer_epochs: int  # epochs in which the prototypes stay as they are; DINO 1
    clip_grad: float  # largest gradient norm; 0: no clipping
    clip_grad_over: Literal["parameter", "network"]  # of each parameter, or as in MSN of all but prototypes

    # What only one method has; null for the others.
    ibot: IBOTSettings | None  # masked patches and their objective
    msn: MSNSettings | None  # random and focal views, me-max, Sinkhorn
    online_em: OnlineEMSettings | None  # of DINO: prototypes by online EM; experimental; null: by the loss' gradient

    def __post_init__(self) -> None:
        check_ranges(self, _RANGES)
        check_backbone(self)
        check_prototypes(self)
        within = f"at most `epochs` (={self.epochs})"
        check_fields(self, ("warmup_epochs", "teacher_temp_warmup_epochs"), within, lambda n: n <= self.epochs)
        self._check_method()

    @property
    def feature_size(self) -> int:
        """Width of the features that the head takes."""
        return self.hidden_size * self.feature_grid**2

    def _check_method(self) -> None:
        of_method = f"with `method` (={self.method!r})"
        for name in ("ibot", "msn"):
            if self.method == name and getattr(self, name) is None:
                raise ValueError(f"`{name}` (=None) must hold that method's settings {of_method}")
            if self.method != name and getattr(self, name) is not None:
                raise ValueError(f"`{name}` must be null {of_method}")
        if self.method == "msn":
            check_fields(self, ("centering",), f"'none' {of_method}", lambda centering: centering == "none")
            check_fields(self, ("normalization",), f"'l2' or 'vmf' {of_method}", lambda kind: kind != "none")
            check_fields(self, ("fused_loss",), f"false {of_method}, whose K is small", lambda fused: not fused)
        else:
            check_fields(self, ("centering",), f"'logit' or 'probability' {of_method}", lambda kind: kind != "none")
        if self.ibot is not None:
            start, shared = self.ibot.mask_start_epoch, self.ibot.shared_head
            left = f"at most `epochs` (={self.epochs}) - `ibot.mask_start_epoch` (={start})"
            check_fields(self, ("teacher_temp_warmup_epochs",), left, lambda epochs: epochs <= self.epochs - start)
            same = f"`out_dim` (={self.out_dim}) with a shared head"
            check_fields(
                self.ibot, ("patch_out_dim",), same, lambda size: not shared or size == self.out_dim, section="ibot."
            )


_COUNTS = ("epochs", "batch_size", "save_every", "num_hidden_layers", "hidden_dim", "bottleneck_dim")
_SIZES = ("image_size", "local_size", "patch_size", "hidden_size", "num_attention_heads", "head_layers", "feature_grid")
_NOT_NEGATIVE = ("num_workers", "num_local_crops", "warmup_epochs", "freeze_last_layer_epochs", "min_lr")
_NOT_NEGATIVE += ("teacher_temp_warmup_epochs", "weight_decay", "weight_decay_end", "clip_grad", "warmup_start_lr")
_NOT_NEGATIVE += ("norms_lr_multiplier", "prototype_koleo_weight")
_RANGES: Ranges = (
    (_COUNTS + _SIZES, "at least 1", lambda value: value >= 1),
    (_NOT_NEGATIVE, "at least 0", lambda value: value >= 0),
    (("seed",), "in [0, 2^64), as torch has it", lambda seed: 0 <= seed < 2**64),
    (("out_dim",), "at least 2: one prototype takes everything", lambda value: value >= 2),
    (("lr", "initializer_range"), "positive", lambda value: value > 0),
    (("student_temp", "teacher_temp", "teacher_temp_warmup"), f"at least {LOWEST_TEMPERATURE}", is_temperature),
    (
        ("global_scale", "local_scale"),
        "(low, high) with 0 < low <= high <= 1",
        lambda scale: 0 < scale[0] <= scale[1] <= 1,
    ),
    (("solarize_prob", "grayscale_prob"), "in [0, 1]", is_share),
    (("blur_prob",), "three numbers in [0, 1]", lambda values: all(map(is_share, values))),
    (("momentum_teacher", "center_momentum"), "in [0, 1]", is_share),
    (("drop_path",), "in [0, 1)", lambda value: 0 <= value < 1),
    (("schedule_stretch",), "at least 1", lambda value: value >= 1),
)


def load_recipe(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read recipes/NAME.yaml, or the file at a path, with some fields replaced; "msn.patch_drop" is one in a section.

    Raises FileNotFoundError naming the recipes there are, and ValueError for missing, unknown or mistyped fields.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise FileNotFoundError(f"no recipe `{name_or_path}`: expected the path of a .yaml file or one of {known}")
    settings = read_yaml(path)
    _override(settings, overrides or {}, path.name)
    return recipe_from_dict(settings, source=path.name)


def replaced(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """Return the recipe with some fields replaced, as `load_recipe` does; raise ValueError for unknown or bad ones."""
    settings = plain(recipe)
    _override(settings, overrides, recipe.name)
    return recipe_from_dict(settings, source=recipe.name)


def _override(settings: dict[str, Any], overrides: Mapping[str, Any], source: str) -> None:
    for name, value in overrides.items():
        section, _, field = name.rpartition(".")
        if section and not isinstance(settings.get(section), dict):
            raise ValueError(f"{source}: no section {section} to set {field} in")
        (settings[section] if section else settings)[field] = value


def parse_overrides(items: Sequence[str]) -> dict[str, Any]:
    """Return the fields and values of items like "lr=1e-3" or "msn.patch_drop=0.5", for `load_recipe`.

    Raises ValueError for an item of another form.
    """
    overrides = {}
    for item in items:
        name, separator, value = item.partition("=")
        if not separator:
            raise ValueError(f"`--set` (={item!r}) must be FIELD=VALUE")
        overrides[name] = parse_yaml(value, f"`--set` (={item!r})")
    return overrides


def recipe_from_dict(settings: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Return the recipe with these settings; every field must be there, with a value of the field's type.

    Only what `EARLIER` has may be missing. Raises ValueError, beginning with `source`, where that is not so.
    """
    try:
        return read_settings(Recipe, {**EARLIER, **settings})
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write every setting; `load_recipe(path)` gives the same recipe."""
    with whole_file(path) as file:
        file.write(yaml.safe_dump(plain(recipe), sort_keys=False).encode())


def differences(requested: Recipe, saved: Recipe) -> list[str]:
    """Return one line for each field that makes the two recipes different runs (`num_workers` does not)."""
    here, there = flat(requested), flat(saved)
    names = [name for name in here | there if name != "num_workers" and here.get(name) != there.get(name)]
    return [f"{name}: {there.get(name)!r} in the run, {here.get(name)!r} requested" for name in names]
