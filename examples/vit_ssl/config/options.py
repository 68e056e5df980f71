"""The command line of pretrain.py: what does not change the result; what does is in the recipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

Strategy = Literal["ddp", "fsdp2"]
"""How several processes share a model; see training/parallel.py."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Pretrain a vision transformer. What changes the result is in the recipe, see recipes/*.yaml."""

    recipe: str | None = None
    """Name of a file in recipes/, or the path of a .yaml file; a run that is resumed has its own."""
    output: Path | None = None
    """Directory of the run, which all processes see; without --resume it must not hold one."""
    data: Path | None = None
    """Images in place of the recipe's: a folder PATH/{train,val,test}/CLASS/*.jpg or PATH/CLASS/*.jpg, or a set that
    `datasets` opens, of the hub or a folder of parquet files. A run that is resumed knows them."""
    list_recipes: bool = False
    """Print the recipes: what each is for, its data and its time."""
    explain: str | None = None
    """Print what a field of recipes means, and its value in --recipe, or in all of them."""
    images_per_epoch: int | None = None
    """Number of images in a stream that does not say it."""
    seed: int | None = None
    """Seed in place of the recipe's."""
    init_backbone: str | None = None
    """Start from this ViT in place of a random one: a run's backbone/, another folder, a name on the hub, timm:NAME, or
    a .pth file of DINO, iBOT or MSN."""
    init_head: str | None = None
    """Start from this head and its centre: a run's heads/teacher, another folder, or a name on the hub."""
    warm_start_head: bool = False
    """Start from a head whose prototypes are a vMF mixture, fitted to what --init-backbone makes of the images."""
    max_steps: int | None = None
    """Stop after this many steps of the run, with the schedules of the whole run."""
    resume: bool = False
    """Continue the run in --output at its last checkpoint; nothing else has to be said again."""
    overrides: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="FIELD=VALUE")] = ()
    """Recipe fields to replace, e.g. --set lr=1e-3 epochs=10."""

    strategy: Strategy = "ddp"
    """How several processes of torchrun share the work: each with whole networks (ddp) or with a part (fsdp2)."""
    prototype_parallel: int = 1
    """Let so many processes share the prototypes of both heads out, instead of a copy each; see docs/scale.md."""
    accumulate: int = 1
    """Cut a process' part of the batch into so many micro-batches: less memory, the same step."""
    compile: bool = False
    """torch.compile the backbone's blocks."""
    activation_checkpointing: bool = False
    """Compute the student's blocks again in the backward pass: less memory, about a quarter more time."""
    num_workers: int | None = None
    """Loader processes of each process, instead of the recipe's."""
    log_every: int = 1
    """Steps between rows of metrics.jsonl."""
    tensorboard: bool = False
    """Write the same numbers for `tensorboard --logdir OUTPUT/tensorboard`."""
    watch: int = 0
    """Every so many epochs measure the teacher's features on a small sample of images (kNN, linear probe, RankMe, ...)
    for metrics.jsonl, and draw the page OUTPUT/curves.html; it changes no loss. 0: never."""
    collapse_window: int | None = None
    """Stop a run that looks collapsed for so many steps on end; by default an epoch, at least 100. 0: never."""
    export_program: bool = False
    """Also write the backbone as OUTPUT/backbone.pt2, a program of torch.export that needs neither this code nor
    transformers: images (B, 3, image_size, image_size) -> [CLS] features (B, hidden_size)."""
    push_to_hub: str | None = None
    """Also upload the backbone, at the end, to this repository of the Hugging Face hub."""
    debug: bool = False
    """Show the traceback of an error."""

    def check(self) -> None:
        """Raise ValueError naming a number that is out of range, or the folder of the run when it is missing."""
        lowest = {"max_steps": 1, "images_per_epoch": 1, "log_every": 1, "collapse_window": 0, "num_workers": 0}
        lowest |= {"prototype_parallel": 1, "watch": 0}
        for name, low in lowest.items():
            if (value := getattr(self, name)) is not None and value < low:
                raise ValueError(f"`{name}` (={value}) must be at least {low}")
        if self.warm_start_head and not self.resume and (self.init_backbone is None or self.init_head is not None):
            raise ValueError("`warm_start_head` needs `init_backbone`, to fit a head to, and no `init_head` beside it")
        if self.output is None and not (self.list_recipes or self.explain):
            raise ValueError("`output` (=None) must be the folder of the run")
