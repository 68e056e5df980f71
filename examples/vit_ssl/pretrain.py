"""Pretrain a vision transformer with DINO, iBOT or MSN, with or without vMF.

    python examples/vit_ssl/pretrain.py --recipe photos_dino_vmf --output runs/photos_dino_vmf
    torchrun --nproc-per-node 8 examples/vit_ssl/pretrain.py --recipe ... --output ... --strategy fsdp2

writes recipe.yaml, metrics.jsonl (a row per step), checkpoint.pt and, at the end, the teacher's backbone as a
transformers model in backbone/. SIGTERM or Ctrl-C saves and stops; the same command with --resume continues at that
very step, with any number of processes. With the same number (of a stream's loader processes, too) and on CPUs it gives
bit for bit the losses of an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import dataclasses
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

from checkpoint import RUN_FILES, load_checkpoint, load_run, save_checkpoint
from collapse import CollapseDetector, TrainingCollapsed
from config import Recipe, differences, load_recipe, save_recipe
from distributed import barrier, device, is_main, process_group, world_size
from interruption import postponed_signals
from loading import load_steps, micro_batch_size, training_images
from methods import build_method
from metrics import MetricsLog, mean_statistics
from optimization import parameter_groups
from parallel import Strategy, parallelize
from runtime.ending import sound_ending
from schedules import Schedules
from training_state import restore_state, whole_state
from training_step import check_statistics, seed_step, train_step


@dataclasses.dataclass(frozen=True)
class Options:
    """Pretrain a vision transformer. What changes the result is in the recipe, see recipes/*.yaml."""

    recipe: str
    """Name of a file in recipes/, or the path of a .yaml file."""
    output: Path
    """Directory of the run, which all processes see; without --resume it must not hold one."""
    data: Path | None = None
    """Folder of images or name of a hub set, for recipes with `dataset` folder, hub or stream."""
    images_per_epoch: int | None = None
    """Of a stream that does not say how many images it has."""
    seed: int | None = None
    """Instead of the recipe's."""
    max_steps: int | None = None
    """Stop after this many steps of the run, with the schedules of the whole run."""
    resume: bool = False
    """Continue the run in --output at its last checkpoint."""
    overrides: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="FIELD=VALUE")] = ()
    """Recipe fields to replace, e.g. --set lr=1e-3 epochs=10."""

    strategy: Strategy = "ddp"
    """How several processes of torchrun share the work: each with whole networks (ddp) or with a part (fsdp2)."""
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
    collapse_window: int | None = None
    """Stop a run that looks collapsed for so many steps on end; by default an epoch, at least 100. 0: never."""
    push_to_hub: str | None = None
    """Also upload the backbone, at the end, to this repository of the Hugging Face hub."""


def main(options: Options) -> None:
    """Run the command line, from recipe to exported backbone, in one process or as one of torchrun's."""
    lowest = {"max_steps": 1, "images_per_epoch": 1, "log_every": 1, "collapse_window": 0, "num_workers": 0}
    for name, low in lowest.items():
        if (value := getattr(options, name)) is not None and value < low:
            raise ValueError(f"`{name}` (={value}) must be at least {low}")
    recipe = load_recipe(options.recipe, parse_overrides(options))
    with process_group():
        train(recipe, options)
        if is_main():
            export(options.output, options.push_to_hub)


def train(recipe: Recipe, options: Options) -> None:
    """All steps that are left, and checkpoints on the way; SystemExit(128 + signal) when it is asked to stop."""
    output, where = options.output, device()
    state = resumable_state(output, recipe) if options.resume else None
    if state is None and (found := [name for name in RUN_FILES if (output / name).exists()]):
        raise FileExistsError(f"`output` (={str(output)!r}) already holds a run ({found[0]}): use another, or --resume")
    images = training_images(recipe, options.data, options.images_per_epoch)
    if state is not None and state["images"] != len(images):
        raise ValueError(f"`data` holds {len(images)} images, but the run in {output} began with {state['images']}")
    images_at_once = micro_batch_size(recipe, options.accumulate)
    steps_per_epoch = len(images) // recipe.batch_size
    last_step = min(recipe.epochs * steps_per_epoch, options.max_steps or sys.maxsize)
    schedules = Schedules.of(recipe, steps_per_epoch)
    bfloat16 = recipe.precision == "bfloat16" or (recipe.precision == "auto" and where.type == "cuda")
    num_workers = recipe.num_workers if options.num_workers is None else options.num_workers
    window = max(100, steps_per_epoch) if options.collapse_window is None else options.collapse_window
    detector = CollapseDetector(recipe.out_dim, window, images_at_once)

    method = build_method(recipe).to(where).train()
    parallelize(
        method,
        strategy=options.strategy,
        bfloat16=bfloat16,
        compile_blocks=options.compile,
        activation_checkpointing=options.activation_checkpointing,
    )
    method.attach()
    groups = parameter_groups(method.student, decay_prototypes=recipe.decay_prototypes)
    optimizer = torch.optim.AdamW(groups)
    step, saved_step, seconds = 0, 0, 0.0
    barrier()  # no process writes before all have found the output as it should be

    def save() -> int:
        whole = whole_state(method, optimizer)
        if is_main():
            progress = {"step": step, "epoch": step // steps_per_epoch, "seconds": seconds}
            save_checkpoint(output, {"recipe": recipe, "images": len(images), **progress, **whole})
        barrier()  # nobody leaves, which would stop the others, before the file is there
        return step

    if state is not None:
        restore_state(method, optimizer, state)
        step, saved_step, seconds = state["step"], state["step"], state["seconds"]
        del state
    else:
        if is_main():
            output.mkdir(parents=True, exist_ok=True)
            save_recipe(recipe, output / "recipe.yaml")
        save()

    log = MetricsLog(output, step=step, curves=options.tensorboard) if is_main() else None
    if is_main():
        processes = f", {world_size()} processes, {options.strategy}" if world_size() > 1 else ""
        print(f"{recipe.name}: {len(images)} images, {step} of {last_step} steps done, training on {where}{processes}")
    bar = progress_bar(step * recipe.batch_size, last_step * recipe.batch_size)
    signals = postponed_signals(ignore_repeats=world_size() > 1)
    with bar, contextlib.closing(log) if log else contextlib.nullcontext(), signals as received:
        while step < last_step:
            epoch = step // steps_per_epoch
            bar.set_description(f"{recipe.name} epoch {epoch + 1}/{recipe.epochs}", refresh=False)
            first, end = step % steps_per_epoch, min(steps_per_epoch, last_step - epoch * steps_per_epoch)
            stop = 0
            tick = time.perf_counter()
            for micro_batches in load_steps(
                images, recipe, epoch, first, end, accumulate=options.accumulate, num_workers=num_workers
            ):
                now = {name: float(schedule[step]) for name, schedule in vars(schedules).items()}
                seed_step(recipe.seed, step)
                found = train_step(method, optimizer, micro_batches, epoch, now, recipe, bfloat16)
                statistics, stop = mean_statistics(found, signal=max(received, default=0))
                step += 1
                duration = time.perf_counter() - tick
                tick += duration
                seconds += duration
                try:
                    check_statistics(statistics, recipe)
                    if epoch >= recipe.warmup_epochs:
                        detector.update(statistics)
                except (FloatingPointError, TrainingCollapsed) as error:
                    raise type(error)(
                        f"step {step}: {error}. {output} keeps the checkpoint of step {saved_step}"
                    ) from None
                if log and (step % options.log_every == 0 or step == last_step):
                    speed = {"images_per_second": recipe.batch_size / duration, "seconds": seconds}
                    log.write({"step": step, "epoch": epoch, **now, **statistics, **speed})
                bar.set_postfix(loss=f"{statistics['loss']:.3f}", refresh=False)
                bar.update(recipe.batch_size)
                if stop:
                    break
            due = (epoch + 1) % recipe.save_every == 0 and not detector.suspicious
            if stop or step == last_step or due:
                saved_step = save()
            if stop:
                bar.close()
                if is_main():
                    print(f"{signal.Signals(stop).name}: saved step {step} in {output}; continue with --resume")
                sys.exit(128 + stop)
    if is_main():
        print(f"{recipe.name}: {step} steps done")


def progress_bar(done: int, images: int) -> tqdm:
    """Images per second and the time that is left; on the main process alone."""
    return tqdm(
        total=images,
        initial=done,
        unit="img",
        unit_scale=True,
        mininterval=0.1 if sys.stderr.isatty() else 5,  # a log file keeps every line
        disable=not is_main(),
    )


def export(output: Path, push_to_hub: str | None = None) -> None:
    """Save the teacher's backbone of the last checkpoint as a transformers model; upload it to the hub on request."""
    transformers_logging.disable_progress_bar()
    backbone = load_run(output).backbone
    backbone.embeddings.mask_token = None  # iBOT's, which only pretraining needs
    backbone.save_pretrained(output / "backbone")
    print(f"the teacher's backbone is in {output / 'backbone'}")
    if push_to_hub is not None:
        backbone.push_to_hub(push_to_hub)


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
    with sound_ending():
        main(tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,)))
