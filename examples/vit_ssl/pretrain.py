"""Pretrain a vision transformer with DINO or DINO-vMF.

    python examples/vit_ssl/pretrain.py --recipe photos_dino_vmf --output runs/photos_dino_vmf

writes recipe.yaml, metrics.jsonl (a row per step), checkpoint.pt and, at the end, the teacher's backbone as a
transformers model in backbone/. SIGTERM or Ctrl-C saves and stops; the same command with --resume continues at that
very step and, on CPU, gives bit for bit the losses of an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
import yaml
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from augment import MultiCropDataset
from checkpoint import RUN_FILES, load_checkpoint, save_checkpoint
from config import Recipe, differences, load_recipe, save_recipe
from data import load_images
from ema import ema_update
from interruption import postponed_signals
from loading import epoch_batches, load_batches, multi_crop
from methods.dino import DINO
from metrics import MetricsLog
from optimization import clip_gradients, parameter_groups
from schedules import Schedules


@dataclasses.dataclass(frozen=True)
class Options:
    """Pretrain a vision transformer; every setting is in the recipe, see recipes/*.yaml."""

    recipe: str
    """Name of a file in recipes/, or the path of a .yaml file."""
    output: Path
    """Directory of the run; without --resume it must not hold one."""
    data: Path | None = None
    """Folder of images, for recipes with `dataset: folder`."""
    seed: int | None = None
    """Instead of the recipe's."""
    max_steps: int | None = None
    """Stop after this many steps of the run, with the schedules of the whole run."""
    resume: bool = False
    """Continue the run in --output at its last checkpoint."""
    overrides: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="FIELD=VALUE")] = ()
    """Recipe fields to replace, e.g. --set lr=1e-3 epochs=10."""


def main(options: Options) -> None:
    """Run the command line, from recipe to exported backbone."""
    if options.max_steps is not None and options.max_steps < 1:
        raise ValueError(f"`max_steps` (={options.max_steps}) must be at least 1")
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError(f"`WORLD_SIZE` (={processes}) must be 1: this script trains in one process")
    recipe = load_recipe(options.recipe, parse_overrides(options))
    output = options.output
    state = resumable_state(output, recipe) if options.resume else None
    if state is None and (found := [name for name in RUN_FILES if (output / name).exists()]):
        raise FileExistsError(f"`output` (={str(output)!r}) already holds a run ({found[0]}): use another, or --resume")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autocast = recipe.precision == "bfloat16" or (recipe.precision == "auto" and device.type == "cuda")

    images = load_images(recipe.dataset, "train", data=options.data)
    if len(images) < recipe.batch_size:
        raise ValueError(f"`batch_size` (={recipe.batch_size}) must be at most the number of images (={len(images)})")
    if state is not None and state["images"] != len(images):
        raise ValueError(f"`data` holds {len(images)} images, but the run in {output} began with {state['images']}")
    dataset = MultiCropDataset(images, multi_crop(recipe), recipe.seed)
    steps_per_epoch = len(images) // recipe.batch_size
    last_step = min(recipe.epochs * steps_per_epoch, options.max_steps or sys.maxsize)
    schedules = Schedules.of(recipe, steps_per_epoch)

    torch.manual_seed(recipe.seed)  # for drop path; weights, data order and crops have generators of their own
    method = DINO(recipe).to(device).train()
    optimizer = torch.optim.AdamW(parameter_groups(method.student))
    step, seconds = 0, 0.0

    def save() -> None:
        progress = {"step": step, "epoch": step // steps_per_epoch, "seconds": seconds}
        rng = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
        parts = {"method": method.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng}
        save_checkpoint(output, {"recipe": recipe, "images": len(images), **progress, **parts})

    if state is None:
        output.mkdir(parents=True, exist_ok=True)
        save_recipe(recipe, output / "recipe.yaml")
        save()
    else:
        method.load_state_dict(state["method"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"]["cpu"])
        torch.cuda.set_rng_state_all(state["rng"]["cuda"])
        step, seconds = state["step"], state["seconds"]

    print(f"{recipe.name}: {len(images)} images, {step} of {last_step} steps done, training on {device}")
    log = MetricsLog(output, step=step)
    bar = tqdm(
        total=last_step * recipe.batch_size,
        initial=step * recipe.batch_size,
        unit="img",
        unit_scale=True,
        mininterval=0.1 if sys.stderr.isatty() else 5,  # a log file keeps every line
    )
    with bar, contextlib.closing(log), postponed_signals() as received:
        while step < last_step:
            epoch = step // steps_per_epoch
            bar.set_description(f"{recipe.name} epoch {epoch + 1}/{recipe.epochs}", refresh=False)
            dataset.set_epoch(epoch)
            first, end = step % steps_per_epoch, last_step - epoch * steps_per_epoch
            batches = epoch_batches(len(images), recipe.batch_size, recipe.seed, epoch)[first:end]
            tick = time.perf_counter()
            for crops in load_batches(dataset, batches, recipe.num_workers):
                now = {name: float(schedule[step]) for name, schedule in vars(schedules).items()}
                for group in optimizer.param_groups:
                    group["lr"] = now["lr"]
                    group["weight_decay"] = now["weight_decay"] if group["decayed"] else 0.0

                with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                    loss, statistics = method([crop.to(device, non_blocking=True) for crop in crops], epoch)
                if not math.isfinite(loss.item()):
                    raise FloatingPointError(
                        f"the loss is {loss.item()} at step {step + 1}; {output} keeps the last good checkpoint. "
                        f"Start a new run with a smaller `lr` (={recipe.lr}), a longer warm-up, gradient clipping "
                        f"(`clip_grad`, now {recipe.clip_grad}) or `precision` float32"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                grad_norm = clip_gradients(method.student, recipe.clip_grad)
                if epoch < recipe.freeze_last_layer_epochs:
                    method.student.head.last_layer.zero_grad(set_to_none=True)  # AdamW leaves it as it is, decay too
                optimizer.step()
                ema_update(method.teacher, method.student, now["teacher_momentum"])

                step += 1
                duration = time.perf_counter() - tick
                tick += duration
                seconds += duration
                statistics |= {"grad_norm": grad_norm, "images_per_second": recipe.batch_size / duration}
                log.write({"step": step, "epoch": epoch, "loss": loss, **now, **statistics, "seconds": seconds})
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                bar.update(recipe.batch_size)
                if received:
                    break
            if received or step == last_step or (epoch + 1) % recipe.save_every == 0:
                save()
            if received:
                bar.close()
                print(f"{signal.Signals(received[0]).name}: saved step {step} in {output}; continue with --resume")
                sys.exit(128 + received[0])

    transformers_logging.disable_progress_bar()
    method.teacher.backbone.save_pretrained(output / "backbone")
    print(f"{recipe.name}: {step} steps done; the teacher's backbone is in {output / 'backbone'}")


def parse_overrides(options: Options) -> dict[str, Any]:
    """The recipe fields that the command line replaces."""
    overrides = {} if options.seed is None else {"seed": options.seed}
    for item in options.overrides:
        name, separator, value = item.partition("=")
        if not separator:
            raise ValueError(f"`--set` (={item!r}) must be FIELD=VALUE")
        overrides[name] = yaml.safe_load(value)
    return overrides


def resumable_state(output: Path, recipe: Recipe) -> dict[str, Any]:
    """The checkpoint in `output`; ValueError when it is of another recipe, naming the fields that differ."""
    state = load_checkpoint(output)
    if changed := differences(recipe, state["recipe"]):
        raise ValueError(f"the run in {str(output)!r} has another recipe:\n  " + "\n  ".join(changed))
    return state


if __name__ == "__main__":
    main(tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,)))
