"""Pretrain a vision transformer with DINO, iBOT or MSN, with or without vMF.

    python examples/vit_ssl/pretrain.py --recipe photos_dino_vmf --output runs/photos_dino_vmf
    torchrun --nproc-per-node 8 examples/vit_ssl/pretrain.py --recipe ... --output ... --strategy fsdp2

writes recipe.yaml, metrics.jsonl (a row per step), checkpoint.pt and, at the end, the teacher's backbone as a
transformers model in backbone/ and the heads in heads/. --data takes images of your own; --list-recipes and --explain
FIELD tell what there is to choose; --watch N measures the features every N epochs and draws curves.html. SIGTERM or
Ctrl-C saves and stops; --resume --output RUN continues at that very step, with any number of processes. With the same
number (of a stream's loader processes, too) and on CPUs it gives bit for bit the losses of an uninterrupted run.
"""

from __future__ import annotations

from runtime.ending import sound_ending

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import tyro

from config.cards import recipe_list
from config.explain import explain
from config.options import Options
from config.recipe import Recipe
from data.loading import load_steps, micro_batch_size, training_images
from data.source.check import look_at
from data.source.inventory import images_of_the_run, keep_inventory
from data.source.kept import keep_source
from data.unreadable import print_unreadable
from methods.method import Batch, Method, Statistics
from methods.registry import build_method
from runtime.distributed import device, is_main, process_group, world_size
from training.collapse import CollapseDetector
from training.ema import ema_update
from training.export import export
from training.log import summary
from training.optimization import clip_gradients, drop_last_layer_gradients, parameter_groups
from training.parallel import gradients_shared, parallelize
from training.schedules import Schedules, StepValues
from training.session import Session, work_of, writing
from training.step import check_statistics, seed_step, to_device
from training.warm_start import fit_head, start_from
from watching.watcher import Watcher


def main(options: Options) -> None:
    """Run the command line, from recipe to exported backbone, in one process or as one of torchrun's."""
    options.check()
    if options.list_recipes or options.explain:
        print(explain(options.explain, options.recipe) if options.explain else recipe_list())
        return
    output = options.output or Path()  # the check has refused None
    with process_group(), writing(output, resume=options.resume):
        train(options)
        if is_main():
            export(output, options.push_to_hub, program=options.export_program)
            print("\n".join(summary(output)))
            evaluate = os.path.relpath(Path(__file__).with_name("evaluate.py"))
            print(f"is it better than raw pixels? python {evaluate} compare {shlex.quote(str(output))}")


def train(options: Options) -> None:
    """Do all steps that are left, with checkpoints on the way; raise SystemExit(128 + signal) when asked to stop."""
    output, recipe, source, state = work_of(options)

    # -------------------------------------------------------------------------------------------------- Images
    images = training_images(recipe, source.data, source.images_per_epoch)
    if state is not None:
        images = images_of_the_run(images, output)
    images_at_once = micro_batch_size(recipe, options.accumulate)
    workers = recipe.num_workers if options.num_workers is None else options.num_workers
    steps_per_epoch = len(images) // recipe.batch_size
    last_step = min(recipe.epochs * steps_per_epoch, options.max_steps or sys.maxsize)

    # ------------------------------------------------------------------------------- Student, teacher and loss
    method = build_method(recipe).to(device()).train()
    if state is None:
        start_from(method, options.init_backbone, options.init_head)
        if options.warm_start_head or recipe.online_em is not None:
            fit_head(method, images, output, num_workers=workers)
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
    watcher = Watcher(images, recipe, source.data, every=options.watch) if options.watch else None
    session = Session(
        recipe,
        output,
        images=len(images),
        last_step=last_step,
        log_every=options.log_every,
        tensorboard=options.tensorboard,
    )
    session.begin(method, optimizer, state)
    keep_inventory(images, output)
    if is_main():
        keep_source(output, source)  # before the look at the images, which takes seconds
        if session.step == 0:
            keep_source(output, source, look_at(images, recipe))
    del state
    if is_main():
        processes = f", {world_size()} processes, {options.strategy}" if world_size() > 1 else ""
        processes += f", prototypes in {options.prototype_parallel} parts" if options.prototype_parallel > 1 else ""
        done = f"{session.step} of {last_step} steps done"
        print(f"{recipe.name}: {len(images)} images, {done}, training on {device()}{processes}")
        if watcher:
            print(watcher.plan())

    # ------------------------------------------------------------------------------------------------ Training
    with session:
        while session.step < last_step:
            epoch, first = divmod(session.step, steps_per_epoch)
            end = min(steps_per_epoch, last_step - epoch * steps_per_epoch)
            session.start_clock(epoch)
            for micro_batches in load_steps(
                images, recipe, epoch, first, end, output, accumulate=options.accumulate, num_workers=workers
            ):
                now = schedules.at(session.step)
                seed_step(recipe.seed, session.step)
                found = train_step(method, optimizer, micro_batches, epoch, now, recipe, bfloat16)
                statistics = session.count_step(found)
                with session.errors_name_the_step():
                    check_statistics(statistics, recipe)
                    if epoch >= recipe.warmup_epochs:
                        detector.update(statistics)
                seen: dict[str, float] = {}
                if watcher and watcher.due(session.step, steps_per_epoch, last_step) and not session.signal:
                    seen = watcher.look(method)
                session.log_step({"epoch": epoch, **now._asdict(), **statistics, **seen}, always=bool(seen))
                if watcher and seen:
                    with session.errors_name_the_step():
                        watcher.draw(output, refresh=session.step < last_step)
                    session.start_clock(epoch)
                if session.signal:
                    break
            due = (epoch + 1) % recipe.save_every == 0 and not detector.suspicious
            if session.signal or session.step == last_step or due:
                session.save(method, optimizer)
            if session.signal:
                session.leave()
    if is_main():
        print(f"{recipe.name}: {session.step} steps done")
        if watcher:
            print(watcher.cost())
        print_unreadable(output)


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
    if epoch < recipe.freeze_last_layer_epochs or recipe.online_em is not None:
        drop_last_layer_gradients(method.student)

    # ---------------------------------------------------------------------------------------------------- Step
    optimizer.step()

    # ------------------------------------------------------------- The teacher follows, as a moving average (EMA)
    ema_update(method.teacher, method.student, now.teacher_momentum)

    # ----------------------- Prototypes that are a mixture follow the teacher's features; others have learnt above
    of_step = method.follow_features() | method.center_statistics(epoch) | {"grad_norm": grad_norm}
    return [statistics | of_step for statistics in found]


if __name__ == "__main__":
    with sound_ending():
        main(tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,)))
