"""What a run has around its steps: a directory with checkpoints, a log, a progress bar, and signals that end it."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from config.options import Options
from config.recipe import Recipe, differences, load_recipe, parse_overrides, replaced, save_recipe
from data.source.kept import Source, read_source
from data.source.kind import kind_of
from methods.method import Method
from runtime.distributed import barrier, is_main, on_main, world_size
from runtime.failure import explain
from runtime.interruption import postponed_signals
from storage.lock import locked
from training.collapse import TrainingCollapsed
from training.log import MetricsLog, mean_statistics
from training.run import RUN_FILES, load_checkpoint, save_checkpoint
from training.state import restore_state, whole_state


def refuse_to_overwrite(output: Path) -> None:
    """Raise FileExistsError when `output` holds a run."""
    if found := [name for name in RUN_FILES if (output / name).exists()]:
        raise FileExistsError(f"`output` (={str(output)!r}) already holds a run ({found[0]}): use another, or --resume")


@contextlib.contextmanager
def writing(output: Path, *, resume: bool) -> Iterator[None]:
    """Around everything that writes into `output`: no other run does meanwhile, and no run there is overwritten.

    The main process holds the lock for all of torchrun's. Every process must call it.

    Raises:
        FileExistsError: `output` holds a run, and `resume` is false.
        FileNotFoundError: `output` does not exist, and `resume` is true.
        FolderInUse: another run writes into `output`.
    """
    with contextlib.ExitStack() as stack:

        def claim() -> None:
            if resume and not output.is_dir():
                raise FileNotFoundError(f"`output` (={str(output)!r}) must be the folder of a run, with --resume")
            if not resume:
                refuse_to_overwrite(output)  # before an empty lock is made beside the run
            stack.enter_context(locked(output))
            if not resume:
                refuse_to_overwrite(output)  # of a process that began and ended in between

        on_main(claim)
        yield


class Work(NamedTuple):
    """What a start of a run works on: said on the command line, or known to the run that it continues."""

    output: Path
    recipe: Recipe
    source: Source
    state: dict[str, Any] | None  # the checkpoint to continue from


def work_of(options: Options) -> Work:
    """Return what the command line asks for; a run that is resumed has its own recipe and images where none are named.

    Unless --set names a `dataset`, it is the kind of image set that the images are of. Every process must call it.

    Raises:
        ValueError: nothing tells the recipe, or it is another one than that of the run; the message names the fields.
        FileNotFoundError: there is no such recipe, folder of images or checkpoint.
    """
    output = options.output or Path()
    state = load_checkpoint(output) if options.resume else None
    kept = read_source(output) if options.resume else Source()
    source = Source(options.data or kept.data, options.images_per_epoch or kept.images_per_epoch)
    overrides = ({} if options.seed is None else {"seed": options.seed}) | parse_overrides(options.overrides)
    if options.recipe is not None:
        recipe = load_recipe(options.recipe, overrides)
    elif state is not None:
        recipe = replaced(state["recipe"], overrides)
    else:
        raise ValueError("`recipe` (=None) must be one that --list-recipes prints, or the path of a .yaml file")
    if source.data is not None and "dataset" not in overrides:
        found = _dataset(recipe, options.data) if options.data or state is None else state["recipe"].dataset
        recipe = dataclasses.replace(recipe, dataset=found)
    if state is not None and (changed := differences(recipe, state["recipe"])):
        raise ValueError(
            f"the run in {str(output)!r} has another recipe:\n  " + "\n  ".join(changed) + "\n"
            "with --resume and --output alone it goes on with its own"
        )
    return Work(output, recipe, source, state)


def _dataset(recipe: Recipe, data: Path) -> str:
    kind = kind_of(data)
    if kind == "hub" and not data.exists() and is_main():
        print(f"`data` (={str(data)!r}) is no folder here, so it is taken for a set of the hub", file=sys.stderr)
    return "stream" if kind == "hub" and recipe.dataset == "stream" else kind


class Session:
    """One start of a run, from `begin` to its last step or to a signal. Every process has one; the main one writes.

    Args:
        recipe: of the run.
        output: directory of the run.
        images: how many an epoch has.
        last_step: the step after which this start ends.
        log_every: steps between rows of metrics.jsonl.
        tensorboard: whether to write curves, too.

    Attributes:
        step: training steps done, in this start and earlier ones.
        signal: the number of the signal that asks the run to stop, on whichever process it arrived; 0 until then.
    """

    def __init__(
        self, recipe: Recipe, output: Path, *, images: int, last_step: int, log_every: int, tensorboard: bool
    ) -> None:
        self.recipe, self.output, self.images, self.last_step = recipe, output, images, last_step
        self.log_every, self.tensorboard = log_every, tensorboard
        self.step, self.signal = 0, 0
        self._saved_step: int | None = None
        self._seconds = 0.0

    def begin(self, method: Method, optimizer: torch.optim.Optimizer, state: dict[str, Any] | None) -> None:
        """Continue from `state`, or write the recipe and the checkpoint of step 0 into a new directory.

        Raises ValueError when the state is of a run with another number of images.
        """
        if state is not None and state["images"] != self.images:
            raise ValueError(
                f"`data` holds {self.images} images, but the run in {self.output} began with {state['images']}"
            )
        barrier()  # no process writes before all have found the output as it should be
        if state is not None:
            restore_state(method, optimizer, state)
            self.step, self._saved_step, self._seconds = state["step"], state["step"], state["seconds"]
        else:
            self.save(method, optimizer)
        # After the checkpoint, so that a process killed in between has left a run to resume, or none at all.
        if is_main() and not (self.output / "recipe.yaml").exists():
            save_recipe(self.recipe, self.output / "recipe.yaml")

    def __enter__(self) -> Session:
        """Open the log and the progress bar, and postpone SIGTERM and Ctrl-C to the end of a step."""
        with contextlib.ExitStack() as stack:
            self._received = stack.enter_context(postponed_signals(ignore_repeats=world_size() > 1))
            self._log: MetricsLog | None = None
            if is_main():
                self._log = MetricsLog(self.output, step=self.step, curves=self.tensorboard)
                stack.callback(self._log.close)
            self._bar = stack.enter_context(self._progress_bar())
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        """Close what was opened."""
        self._closing.close()

    def _progress_bar(self) -> tqdm:
        size = self.recipe.batch_size
        return tqdm(
            total=self.last_step * size,
            initial=self.step * size,
            unit="img",
            unit_scale=True,
            mininterval=0.1 if sys.stderr.isatty() else 5,  # a log file keeps every line
            disable=not is_main(),
        )

    def start_clock(self, epoch: int) -> None:
        """Begin to measure the time of steps, those of this epoch; what it took to save or to look is not theirs."""
        self._bar.set_description(f"{self.recipe.name} epoch {epoch + 1}/{self.recipe.epochs}", refresh=False)
        self._tick = time.perf_counter()

    def count_step(self, found: Sequence[dict[str, float | Tensor]]) -> dict[str, float]:
        """Count a step that is done, and return its statistics, averaged over micro-batches and processes."""
        statistics, self.signal = mean_statistics(list(found), signal=max(self._received, default=0))
        now = time.perf_counter()
        self._duration, self._tick = now - self._tick, now
        self._seconds += self._duration
        self.step += 1
        return statistics

    @contextlib.contextmanager
    def errors_name_the_step(self) -> Iterator[None]:
        """Make the errors of a training that has failed say at which step, and which checkpoint there is."""
        try:
            yield
        except (FloatingPointError, TrainingCollapsed, OSError) as error:
            saved = f"keeps the checkpoint of step {self._saved_step}" if self._saved_step is not None else "is empty"
            kept = f"{self.output} {saved}"
            if isinstance(error, OSError):  # the disk is full, for example
                raise OSError(f"step {self.step}: {explain(error)}. {kept}") from error
            raise type(error)(f"step {self.step}: {error}. {kept}") from None

    def log_step(self, row: Mapping[str, float], *, always: bool = False) -> None:
        """Show the step that was counted, and write its numbers to the log if it is due or `always`."""
        if self._log and (always or self.step % self.log_every == 0 or self.step == self.last_step):
            speed = {"images_per_second": self.recipe.batch_size / self._duration, "seconds": self._seconds}
            with self.errors_name_the_step():
                self._log.write({"step": self.step, **row, **speed})
        self._bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
        self._bar.update(self.recipe.batch_size)

    def save(self, method: Method, optimizer: torch.optim.Optimizer) -> None:
        """Write the checkpoint of this step; every process must call it."""
        whole = whole_state(method, optimizer)
        epoch = self.step // (self.images // self.recipe.batch_size)
        progress = {"step": self.step, "epoch": epoch, "seconds": self._seconds}
        with self.errors_name_the_step():
            # Nobody leaves, which would stop the others, before the file is there.
            on_main(
                lambda: save_checkpoint(
                    self.output, {"recipe": self.recipe, "images": self.images, **progress, **whole}
                )
            )
        self._saved_step = self.step

    def leave(self) -> None:
        """End the process as the signal wants it; the run has been saved."""
        self._bar.close()
        if is_main():
            name = signal.Signals(self.signal).name
            print(f"{name}: saved step {self._saved_step} in {self.output}; continue with --resume", flush=True)
        sys.exit(128 + self.signal)
