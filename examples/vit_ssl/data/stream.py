"""Pretraining on a stream: image sets too large to hold, read in order by every loader process of every rank."""

from __future__ import annotations

import hashlib
import itertools
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from data.hub import content, decode, open_set
from runtime.interruption import leave_process_group
from storage.torch_file import UnreadableFile

SHUFFLE_BUFFER = 1000
"""Each loader process draws its next image from so many undecoded ones; the order of the shards is shuffled, too."""


class ImageStream:
    """One split of a set that `datasets` can stream, cut into disjoint parts for the loader processes.

    `images` is the length of an epoch; by default what the set's description says. Raises ValueError where that says
    nothing.
    """

    def __init__(self, name: str, split: str = "train", *, images: int | None = None) -> None:
        import datasets

        rows, self.column, _ = open_set(name, split, streaming=True)
        self.name = name
        self._rows = rows.select_columns(self.column).cast_column(self.column, datasets.Image(decode=False))
        described = (rows.info.splits or {}).get(rows.split)
        self._images = images or (described.num_examples if described else 0)
        if self._images < 1:
            raise ValueError(f"`data` (={name!r}) does not say how many images it has: give `images_per_epoch`")

    def __len__(self) -> int:
        return self._images

    def part(self, index: int, parts: int, seed: int, epoch: int) -> Iterator[dict[str, Any]]:
        """Yield the undecoded images of part `index` of `parts`, in an order drawn from (seed, epoch), without end.

        The parts are whole files where their number divides by `parts`; otherwise every part reads all files and keeps
        its share. A part that is shorter than an epoch needs begins anew; one without any image raises ValueError.
        """
        from datasets.distributed import split_dataset_by_node

        for lap in itertools.count():
            order = random.Random(f"{seed},{epoch},{lap}").getrandbits(31)
            shuffled = self._rows.shuffle(seed=order, buffer_size=SHUFFLE_BUFFER)
            mine = split_dataset_by_node(shuffled, rank=index, world_size=parts)
            # `iter` does not divide the images once more among loader processes, as plain iteration would.
            found = 0
            try:
                for batch in mine.iter(batch_size=32):
                    found += len(batch[self.column])
                    yield from batch[self.column]
            except Exception as error:  # of `datasets` and the many libraries behind it
                raise UnreadableFile(f"the stream {self.name!r} cannot be read: {error}") from error
            if not found:
                raise ValueError(f"part {index} of {parts} of the stream holds no image: use fewer loader processes")


class StreamedViews(IterableDataset):
    """The views of one process for batches `first` to `last` - 1 of an epoch, `batch_size` images each.

    An image's views are seeded by (seed, epoch, its content) alone, so they do not depend on the order, the number of
    ranks or of loader processes; which images meet in a batch does. A run resumed with the same numbers continues with
    the very batches that it would have had; images already used are skipped undecoded. In place of an image that cannot
    be read comes a grey one, with a warning: nobody can repair a stream, and one image must not end a long run.
    """

    def __init__(
        self,
        stream: ImageStream,
        transform: Callable[[Image.Image, random.Random], Any],
        *,
        seed: int,
        epoch: int,
        batch_size: int,
        first: int,
        last: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.stream, self.transform, self.seed, self.epoch = stream, transform, seed, epoch
        self.batch_size, self.first, self.last, self.rank, self.world_size = batch_size, first, last, rank, world_size

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        workers = 1 if worker is None else worker.num_workers
        # The loader takes a batch from each of its processes in turn, always beginning with process 0. So that batch b
        # is of the same part whether the run was resumed at it or not, the processes exchange their parts.
        part = ((0 if worker is None else worker.id) + self.first) % workers
        images = self.stream.part(self.rank * workers + part, self.world_size * workers, self.seed, self.epoch)
        done, all_of_them = (len(range(part, end, workers)) * self.batch_size for end in (self.first, self.last))
        for item in itertools.islice(images, done, all_of_them):
            file, image = _read(item, self.stream.name)
            digest = hashlib.blake2b(file, digest_size=16).hexdigest()
            yield self.transform(image, random.Random(f"{self.seed},{self.epoch},{digest}"))


def _read(item: dict[str, Any] | None, name: str) -> tuple[bytes, Image.Image]:
    file = b""
    try:
        file = content(item, name)
        return file, decode(file, (item and item["path"]) or "an image without a name")
    except OSError as error:
        warnings.warn(f"{error}; a grey image takes its place", stacklevel=2)
        return file, Image.new("RGB", (256, 256), (124, 116, 104))


def stream_batches(
    views: StreamedViews, num_workers: int, collate_samples: Callable[..., Any] = default_collate
) -> Iterable[Any]:
    """Return a loader of collated batches: one for each of the batches that `views` is for."""
    return DataLoader(
        views,
        batch_size=views.batch_size,
        collate_fn=collate_samples,
        num_workers=num_workers,
        worker_init_fn=leave_process_group,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or each loader would draw from the global one
    )
