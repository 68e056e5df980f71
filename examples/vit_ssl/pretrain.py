"""Pretrain a vision transformer with DINO, iBOT or MSN, with or without vMF.

    python examples/vit_ssl/pretrain.py --recipe photos_dino_vmf --output runs/photos_dino_vmf
    torchrun --nproc-per-node 8 examples/vit_ssl/pretrain.py --recipe ... --output ... --strategy fsdp2

writes recipe.yaml, metrics.jsonl (a row per step), checkpoint.pt and, at the end, the teacher's backbone as a
transformers model in backbone/ and the heads in heads/. SIGTERM or Ctrl-C saves and stops; the same command with
--resume continues at that very step, with any number of processes. With the same number (of a stream's loader
processes, too) and on CPUs it gives bit for bit the losses of an uninterrupted run.
"""

from __future__ import annotations

from runtime.ending import sound_ending

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import tyro

from config.recipe import Recipe, load_recipe, parse_overrides
from data.inventory import images_of_the_run, keep_inventory
from data.loading import load_steps, micro_batch_size, training_images
from data.unreadable import print_unreadable
from evaluators.features.public_checkpoints import open_public_checkpoint
from methods.method import Batch, Method, Statistics
from methods.registry import build_method
from runtime.distributed import device, is_main, process_group, world_size
from training.collapse import CollapseDetector
from training.ema import ema_update
from training.export import export
from training.optimization import clip_gradients, drop_last_layer_gradients, parameter_groups
from training.parallel import Strategy, gradients_shared, parallelize
from training.schedules import Schedules, StepValues
from training.session import Session, state_to_resume, writing
from training.step import check_statistics, seed_step, to_device
from training.warm_start import fit_head, start_from


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
    """Number of images in a stream that does not say it."""
    seed: int | None = None
    """Seed in place of the recipe's."""
    init_backbone: str | None = None
    """Start from this ViT in place of a random one: a run's backbone/, a folder, a .pth file, or a name on the hub."""
    init_head: str | None = None
    """Start from this head and its centre: a run's heads/teacher, another folder, or a name on the hub."""
    warm_start_head: bool = False
    """Start from a head whose prototypes are a vMF mixture, fitted to what --init-backbone makes of the images."""
    max_steps: int | None = None
    """Stop after this many steps of the run, with the schedules of the whole run."""
    resume: bool = False
    """Continue the run in --output at its last checkpoint."""
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
    collapse_window: int | None = None
    """Stop a run that looks collapsed for so many steps on end; by default an epoch, at least 100. 0: never."""
    push_to_hub: str | None = None
    """Also upload the backbone, at the end, to this repository of the Hugging Face hub."""
    debug: bool = False
    """Show the traceback of an error."""


def main(options: Options) -> None:
    """Run the command line, from recipe to exported backbone, in one process or as one of torchrun's."""
    lowest = {"max_steps": 1, "images_per_epoch": 1, "log_every": 1, "collapse_window": 0, "num_workers": 0}
    lowest |= {"prototype_parallel": 1}
    for name, low in lowest.items():
        if (value := getattr(options, name)) is not None and value < low:
            raise ValueError(f"`{name}` (={value}) must be at least {low}")
    if options.warm_start_head and (options.init_backbone is None or options.init_head is not None):
        raise ValueError("`warm_start_head` needs `init_backbone`, to fit a head to, and no `init_head` beside it")
    seed = {} if options.seed is None else {"seed": options.seed}
    recipe = load_recipe(options.recipe, seed | parse_overrides(options.overrides))
    with process_group(), writing(options.output, resume=options.resume):
        train(recipe, options)
        if is_main():
            export(options.output, options.push_to_hub)


def train(recipe: Recipe, options: Options) -> None:
    """Do all steps that are left, with checkpoints on the way; raise SystemExit(128 + signal) when asked to stop."""
    state = state_to_resume(options.output, recipe) if options.resume else None

    # -------------------------------------------------------------------------------------------------- Images
    images = training_images(recipe, options.data, options.images_per_epoch)
    if state is not None:
        images = images_of_the_run(images, options.output)
    images_at_once = micro_batch_size(recipe, options.accumulate)
    workers = recipe.num_workers if options.num_workers is None else options.num_workers
    steps_per_epoch = len(images) // recipe.batch_size
    last_step = min(recipe.epochs * steps_per_epoch, options.max_steps or sys.maxsize)

    # ------------------------------------------------------------------------------- Student, teacher and loss
    method = build_method(recipe).to(device()).train()
    if state is None:
        start_from(method, options.init_backbone, options.init_head, open_file=open_public_checkpoint)
        if options.warm_start_head:
            fit_head(method, images, options.output, num_workers=workers)
    bfloat16 = recipe.precision == "bfloat16" or (recipe.precision == "auto" and device().type == "cuda")
    parallelize(
        method,
        strategy=options.strategy,
        prototype_parallel=options.prototype_parallel,
        bfloat16=bfloat16,
        compile_blocks=options.compile,
        activation_checkpointing=options.activation_checkpointing,
    )
    method.attach()

    # ------------------------------------------------------------------------------- Optimiser and schedules
    groups = parameter_groups(
        method.student,
        decay_prototypes=recipe.decay_prototypes,
        norms_lr_multiplier=recipe.norms_lr_multiplier,
    )
    optimizer = torch.optim.AdamW(groups)
    schedules = Schedules.of(recipe, steps_per_epoch)

    # ------------------------------------------------------------------ Checkpoints, log, progress and signals
    window = max(100, steps_per_epoch) if options.collapse_window is None else options.collapse_window
    detector = CollapseDetector(recipe.out_dim, window, images_at_once)
    session = Session(
        recipe,
        options.output,
        images=len(images),
        last_step=last_step,
        log_every=options.log_every,
        tensorboard=options.tensorboard,
    )
    session.begin(method, optimizer, state)
    keep_inventory(images, options.output)
    del state
    if is_main():
        processes = f", {world_size()} processes, {options.strategy}" if world_size() > 1 else ""
        processes += f", prototypes in {options.prototype_parallel} parts" if options.prototype_parallel > 1 else ""
        done = f"{session.step} of {last_step} steps done"
        print(f"{recipe.name}: {len(images)} images, {done}, training on {device()}{processes}")

    # ------------------------------------------------------------------------------------------------ Training
    with session:
        while session.step < last_step:
            epoch, first = divmod(session.step, steps_per_epoch)
            end = min(steps_per_epoch, last_step - epoch * steps_per_epoch)
            session.start_clock(epoch)
            for micro_batches in load_steps(
                images, recipe, epoch, first, end, options.output, accumulate=options.accumulate, num_workers=workers
            ):
                now = schedules.at(session.step)
                seed_step(recipe.seed, session.step)
                found = train_step(method, optimizer, micro_batches, epoch, now, recipe, bfloat16)
                statistics = session.count_step(found)
                with session.errors_name_the_step():
                    check_statistics(statistics, recipe)
                    if epoch >= recipe.warmup_epochs:
                        detector.update(statistics)
                session.log_step({"epoch": epoch, **now._asdict(), **statistics})
                if session.signal:
                    break
            due = (epoch + 1) % recipe.save_every == 0 and not detector.suspicious
            if session.signal or session.step == last_step or due:
                session.save(method, optimizer)
            if session.signal:
                session.leave()
    if is_main():
        print(f"{recipe.name}: {session.step} steps done")
        print_unreadable(options.output)


def train_step(
    method: Method,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    epoch: int,
    now: StepValues,
    recipe: Recipe,
    bfloat16: bool,
) -> list[Statistics]:
    """Do one step of student, centre and teacher; return this process' statistics of each micro-batch."""
    found: list[Statistics] = []

    # ----------------------------------------------------------------------------------------------- Schedules
    for group in optimizer.param_groups:
        group["lr"] = now.lr * group.get("lr_multiplier", 1.0)
        group["weight_decay"] = now.weight_decay * group.get("wd_multiplier", 1.0) if group["decayed"] else 0.0

    # -------------------------------------------- Forward, loss, backward: gradients add up over micro-batches
    optimizer.zero_grad(set_to_none=True)
    for index, micro_batch in enumerate(micro_batches):
        last = index == len(micro_batches) - 1  # then processes exchange gradients, and the centre moves
        batch = to_device(micro_batch)
        with gradients_shared(method.student, last):
            with torch.autocast(device().type, torch.bfloat16, enabled=bfloat16):
                with torch.no_grad():
                    teacher_output = method.forward_teacher(batch)
                student_output = method.forward_student(batch, epoch)
                loss, statistics = method.compute_loss(student_output, teacher_output, batch, epoch, commit=last)
            (loss / len(micro_batches)).backward()
        found.append({"loss": loss.detach(), **statistics})

    # ---------------------------------------------------------------------------------------------------- Clip
    grad_norm = clip_gradients(method.student, recipe.clip_grad, over=recipe.clip_grad_over)
    if epoch < recipe.freeze_last_layer_epochs:
        drop_last_layer_gradients(method.student)

    # ---------------------------------------------------------------------------------------------------- Step
    optimizer.step()

    # ------------------------------------------------------------- The teacher follows, as a moving average (EMA)
    ema_update(method.teacher, method.student, now.teacher_momentum)

    of_step = method.center_statistics(epoch) | {"grad_norm": grad_norm}
    return [statistics | of_step for statistics in found]


if __name__ == "__main__":
    with sound_ending():
        main(tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,)))
