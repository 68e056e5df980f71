"""Heads that can be published and found again: a folder, or a repository of the Hugging Face hub, for each.

Needs `safetensors`, and `huggingface_hub` for what is not a folder on this machine: `pip install 'vmf_heads[hub]'`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import one_of, positive
from ._distributed import whole
from .centering import teacher_targets
from .head import PrototypeHead
from .mlp import projection_mlp
from .prototypes import LinearPrototypes, Prototypes

__all__ = ["PretrainedHead"]

AVERAGED = {
    "responsibilities": "the logarithm of a running mean of responsibilities",
    "scores": "the logarithm of a running mean of softmaxes of the scores",
    "logits": "a running mean of the teacher's logits, over its temperature",
}
"""What a centre is, in the words of the model card, by what it averages."""
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
LAYERS: dict[str, type[Prototypes] | type[LinearPrototypes]] = {"weight_norm": Prototypes, "linear": LinearPrototypes}


@dataclass
class PretrainedHead:
    """A trained head with what its targets need: the teacher's temperature and the centre.

    `save_pretrained` writes config.json, model.safetensors and a model card, README.md; `from_pretrained` reads them.

    Attributes:
        head: any `PrototypeHead` whose MLP is one that `projection_mlp` makes, with batch normalisation or without; all
            heads of `compat` are. Of iBOT's head with a second layer for patches, the part for [CLS].
        teacher_temp: the teacher's temperature at the end of the training.
        log_center: c (K,) of Eq. 7, as in the state dict of a loss; None stands for zeros. Of a centre on logits
            (Eq. 8) it is that centre over `teacher_temp`, as `LogitCentering.offset` gives it.
        center_on: what the centre has averaged, "responsibilities", "scores" or "logits".
        backbone: name or address of the backbone that the head belongs to, for the model card.

    Raises:
        ValueError, TypeError: an argument is out of its range, or the head has parts that cannot be written.

    >>> import tempfile, torch
    >>> from vmf_heads import VMFPrototypeHead
    >>> from vmf_heads.hub import PretrainedHead
    >>> head = VMFPrototypeHead(16, 32, hidden_dim=16, bottleneck_dim=8).eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     PretrainedHead(head, teacher_temp=0.07, backbone="facebook/dino-vits16").save_pretrained(folder)
    ...     again = PretrainedHead.from_pretrained(folder)
    >>> x = torch.randn(5, 16)
    >>> torch.equal(again.head(x), head(x)), again.targets(x).shape
    (True, torch.Size([5, 32]))
    """

    head: PrototypeHead
    teacher_temp: float
    log_center: Tensor | None = None
    center_on: str = "responsibilities"
    backbone: str | None = None

    def __post_init__(self) -> None:
        positive("teacher_temp", self.teacher_temp)
        one_of("center_on", self.center_on, AVERAGED)
        if self.log_center is not None and self.log_center.shape != (self.head.num_prototypes,):
            raise ValueError(
                f"`log_center` (of shape {tuple(self.log_center.shape)}) must have the shape "
                f"({self.head.num_prototypes},), a number for each prototype of `head`"
            )

    @torch.no_grad()
    def targets(self, x: Tensor) -> Tensor:
        """The probabilities of the prototypes (..., K), Eq. 7, for backbone features `x` (..., in_dim)."""
        head = self.head
        scores = head.last_layer(head.features(x), exact=head.float32_scores)
        return teacher_targets(
            scores,
            self.teacher_temp,
            log_normalizer=head.log_normalizer(self.teacher_temp),
            log_center=self.log_center,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and README.md into `folder`, which is made where it does not exist.

        Parameters that FSDP2 shards are gathered: then every rank must call, and every rank writes the same.
        """
        safetensors = _safetensors()
        config, weights = self.config(), self._weights()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / CARD).write_text(_card(config), encoding="utf-8")

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes to `repo_id` ("user/name") and return the address of the commit.

        `options` are those of `huggingface_hub.HfApi.create_repo` (`private`, `token`, ...). An existing repository
        keeps its other files.
        """
        hub = _huggingface_hub()
        token = options.get("token")
        repo_id = hub.create_repo(repo_id, exist_ok=True, **options).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(hub.upload_folder(repo_id=repo_id, folder_path=folder, token=token))

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, **options: Any) -> PretrainedHead:
        """Read a head from a folder, or from the repository of that name on the hub; the head is in eval mode, on CPU.

        `options` are those of `huggingface_hub.snapshot_download` (`revision`, `token`, `cache_dir`, ...).

        Raises FileNotFoundError where the folder has no head, ValueError where its files are not those of one.
        """
        folder = Path(name_or_folder)
        if not folder.is_dir():
            if folder.is_absolute() or len(folder.parts) != 2:
                raise FileNotFoundError(
                    f"`name_or_folder` (={str(name_or_folder)!r}) must be a folder with {CONFIG}, or the name "
                    "'user/name' of a repository on the hub"
                )
            files = [CONFIG, WEIGHTS]
            hub = _huggingface_hub()
            folder = Path(hub.snapshot_download(str(name_or_folder), allow_patterns=files, **options))
        elif options:
            raise TypeError(f"`{next(iter(options))}` is for heads on the hub, and {str(folder)!r} is a folder")
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}: it does not hold a head of vmf_heads")
        return cls._read(folder)

    @classmethod
    def _read(cls, folder: Path) -> PretrainedHead:
        safetensors = _safetensors()
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            if config.pop("model_type") != "vmf_prototype_head":
                raise KeyError("model_type")
            rest = {name: config.pop(name) for name in ("teacher_temp", "center_on", "backbone")}
            head = _build(**config)
            weights = safetensors.torch.load_file(folder / WEIGHTS)
            log_center = weights.pop("log_center", None)
            head.load_state_dict(weights)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, safetensors.SafetensorError) as error:
            raise ValueError(f"the files in {folder} are not those of a head of vmf_heads: {error}") from error
        return cls(head.eval(), log_center=log_center, **rest)

    def config(self) -> dict[str, Any]:
        """What config.json says: sizes, temperatures, normaliser and centre."""
        head, mlp = self.head, self.head.get_submodule(self.head.MLP_NAME)
        linear = [layer for layer in mlp.modules() if isinstance(layer, nn.Linear)]
        config = {
            "model_type": "vmf_prototype_head",
            "in_dim": head.in_dim,
            "num_prototypes": head.num_prototypes,
            "bottleneck_dim": head.bottleneck_dim,
            "nlayers": len(linear),
            "hidden_dim": linear[0].out_features if linear else 1,
            "use_bn": any(isinstance(layer, nn.BatchNorm1d) for layer in mlp.modules()),
            "hidden_bias": linear[0].bias is not None if linear else True,
            "out_bias": linear[-1].bias is not None if linear else True,
            "prototypes": next((name for name, kind in LAYERS.items() if isinstance(head.last_layer, kind)), ""),
            "norms_are_frozen": not head.last_layer.norms_require_grad,
            "normalizer": head.normalizer,
            "temperature": head.temperature,
            "float32_scores": head.float32_scores,
        }
        hidden = ["Linear", *(["BatchNorm1d"] if config["use_bn"] else []), "GELU"] * (len(linear) - 1)
        if _kinds(mlp) != [*hidden, "Linear"]:
            raise ValueError(
                f"`head` (a {type(head).__name__}) must have an MLP as `projection_mlp` makes it, with batch "
                f"normalisation or without; its layers are {', '.join(_kinds(mlp))}"
            )
        return config | {"teacher_temp": self.teacher_temp, "center_on": self.center_on, "backbone": self.backbone}

    def _weights(self) -> dict[str, Tensor]:
        head = self.head
        state = {f"mlp.{name}": value for name, value in head.get_submodule(head.MLP_NAME).state_dict().items()}
        state |= {f"last_layer.{name}": value for name, value in head.last_layer.state_dict().items()}
        if self.log_center is not None:
            state["log_center"] = self.log_center
        return {name: whole(value, f"`{name}`").detach().cpu().contiguous() for name, value in state.items()}


def _build(
    *,
    in_dim: int,
    num_prototypes: int,
    bottleneck_dim: int,
    prototypes: str,
    norms_are_frozen: bool,
    normalizer: str,
    temperature: float,
    float32_scores: bool,
    nlayers: int,
    hidden_dim: int,
    use_bn: bool,
    hidden_bias: bool,
    out_bias: bool,
) -> PrototypeHead:
    """The head of a configuration, with random weights."""
    layer = LAYERS[prototypes](bottleneck_dim, num_prototypes)
    if norms_are_frozen and isinstance(layer, Prototypes):
        layer.weight_g.requires_grad_(False)
    mlp = projection_mlp(
        in_dim,
        hidden_dim,
        bottleneck_dim,
        nlayers,
        norm=(lambda: nn.BatchNorm1d(hidden_dim)) if use_bn else None,
        hidden_bias=hidden_bias,
        out_bias=out_bias,
    )
    return PrototypeHead(
        in_dim, mlp, layer, temperature=temperature, normalizer=normalizer, float32_scores=float32_scores
    )


def _kinds(mlp: nn.Module) -> list[str]:
    """The layers of an MLP, in their order; what is a linear layer with another initialisation is a linear layer."""
    layers = list(mlp) if isinstance(mlp, nn.Sequential) else [mlp]
    return ["Linear" if isinstance(layer, nn.Linear) else type(layer).__name__ for layer in layers]


def _card(config: dict[str, Any]) -> str:
    """The model card, in words."""
    name, k, p = config["backbone"], config["num_prototypes"], config["bottleneck_dim"]
    belongs = (
        f"It belongs to the backbone `{name}`." if name else "Its author has not said which backbone it belongs to."
    )
    vmf = config["normalizer"] == "vmf"
    model = (
        f"The prototypes are the components of a von Mises-Fisher mixture on the unit sphere of R^{p}: the direction "
        "of a prototype is the mean of its component, and its norm over the temperature is the concentration."
        if vmf
        else "This is a head of plain DINO, without normalising constants: the norms of its prototypes are no "
        "concentrations."
    )
    return f"""---
library_name: vmf_heads
tags: [self-supervised-learning, dino, von-mises-fisher]
---

# A prototype head: {k} prototypes in {p} dimensions

This head maps {config["in_dim"]} features of a backbone to scores of {k} prototypes. {belongs}

{model}

- Temperatures: {config["temperature"]:g} of the student, {config["teacher_temp"]:g} of the teacher.
- Centre: {AVERAGED[config["center_on"]]}.

```python
from vmf_heads.hub import PretrainedHead

pretrained = PretrainedHead.from_pretrained("the name of this repository, or a folder")
targets = pretrained.targets(features)  # features of the backbone (..., {config["in_dim"]}) to probabilities (..., {k})
head = pretrained.head  # goes on training
```
"""


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("heads are written and read by safetensors: pip install 'vmf_heads[hub]'") from error
    return safetensors


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("the hub is reached by huggingface_hub: pip install 'vmf_heads[hub]'") from error
    return huggingface_hub
