"""Image sets in the formats of the hub, opened from local files: parquet by random access and as a stream."""

import io
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.hub import HubImages, load_hub, open_set
from data.images import load_images
from data.stream import ImageStream, StreamedViews, stream_batches
from storage.torch_file import UnreadableFile

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")
SHARDS, PER_SHARD = 4, 6
IMAGES = SHARDS * PER_SHARD


@pytest.fixture(autouse=True)
def no_cache_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    # Five seconds, which let threads of Arrow end before the process does, would be most of these tests' time.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05)
    datasets.disable_progress_bars()


def picture(number: int) -> bytes:
    """A PNG whose colour is its number."""
    file = io.BytesIO()
    Image.new("RGB", (12, 10), (number, 0, 255)).save(file, "PNG")
    return file.getvalue()


def write_shard(folder: Path, name: str, files: list[bytes], labels: list[int]) -> None:
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["even", "odd"])})
    items = [{"bytes": file, "path": f"{name}-{number}.png"} for number, file in enumerate(files)]
    (folder / "data").mkdir(parents=True, exist_ok=True)
    rows = datasets.Dataset.from_dict({"picture": items, "kind": labels}, features=features)
    rows.to_parquet(folder / "data" / f"{name}.parquet")


@pytest.fixture
def parquet(tmp_path) -> str:
    """A set of two splits: train of four files, validation of one."""
    for shard in range(SHARDS):
        numbers = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        files, labels = [picture(number) for number in numbers], [number % 2 for number in numbers]
        write_shard(tmp_path / "set", f"train-{shard:05d}-of-{SHARDS:05d}", files, labels)
    write_shard(tmp_path / "set", "validation-00000-of-00001", [picture(200)], [0])
    return str(tmp_path / "set")


def number_of(image: Image.Image) -> int:
    return image.getpixel((0, 0))[0]


def numbered(image: Image.Image, rng: random.Random) -> dict[str, list[torch.Tensor]]:
    """A transform that tells which image it was given and what it drew."""
    return {"crops": [torch.tensor([number_of(image), rng.random()], dtype=torch.float64)]}


def batches_of(parquet, *, workers=0, rank=0, world_size=1, batch_size=3, first=0, last=4, epoch=0, seed=7):
    views = StreamedViews(
        ImageStream(parquet, images=IMAGES),
        numbered,
        seed=seed,
        epoch=epoch,
        batch_size=batch_size,
        first=first,
        last=last,
        rank=rank,
        world_size=world_size,
    )
    return [batch["crops"][0].numpy() for batch in stream_batches(views, workers)]


def test_random_access_gives_images_and_labels(parquet):
    images, labels, classes = load_hub(parquet, "train")
    assert [number_of(images[i]) for i in range(len(images))] == list(range(IMAGES))
    assert labels.tolist() == [number % 2 for number in range(IMAGES)]
    assert classes == ["even", "odd"]
    assert (images[3].mode, images[3].size) == ("RGB", (12, 10))
    held_out, _, _ = load_hub(parquet, "val")  # called `validation` there
    assert number_of(held_out[0]) == 200


def test_a_set_without_labels_is_one_class(tmp_path):
    for number in range(3):
        (tmp_path / "plain").mkdir(exist_ok=True)
        (tmp_path / "plain" / f"{number}.png").write_bytes(picture(number))
    images, labels, classes = load_hub(str(tmp_path / "plain"), "train")
    assert sorted(number_of(image) for image in images) == [0, 1, 2]
    assert (labels.tolist(), classes) == ([0, 0, 0], ["image"])


def test_an_image_may_be_a_link(tmp_path):
    (tmp_path / "elsewhere.png").write_bytes(picture(7))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "link.png").symlink_to(tmp_path / "elsewhere.png")
    assert number_of(load_hub(str(tmp_path / "plain"), "train")[0][0]) == 7


def test_an_unknown_split_names_those_there_are(parquet):
    with pytest.raises(FileNotFoundError, match=r"`data` \(=.*\) has no 'test' split; it has train, validation"):
        open_set(parquet, "test")


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"bytes": None, "path": "{outside}"}, "its path '.*outside.png' leads out of the set '.*set'"),
        ({"bytes": None, "path": "http://127.0.0.1:9/x.png"}, "its path 'http://127.0.0.1:9/x.png' leads out of the"),
        (None, "its row holds no image"),
    ],
)
def test_an_image_is_in_the_set_or_not_read(item, reason, tmp_path):
    (tmp_path / "outside.png").write_bytes(picture(9))
    if item:
        item["path"] = item["path"].format(outside=tmp_path / "outside.png")
    features = datasets.Features({"picture": datasets.Image()})
    (tmp_path / "set").mkdir()
    # By pyarrow, because `datasets` reads files outside and puts them in.
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pydict({"picture": [item]}, features.arrow_schema), tmp_path / "set" / "train.parquet"
    )
    images, _, _ = load_hub(str(tmp_path / "set"), "train")
    with pytest.raises(OSError, match=rf"cannot read image 0 \(.*\): {reason}"):
        images[0]
    with pytest.warns(UserWarning, match=rf"{reason}.*; a grey image takes its place"):
        assert np.concatenate(batches_of(str(tmp_path / "set"), batch_size=1, last=1))[0, 0] == 124


def test_images_without_a_label_are_counted(tmp_path):
    write_shard(tmp_path / "set", "train-00000-of-00001", [picture(1), picture(2)], [0, None])
    with pytest.raises(ValueError, match=r"`data` \(=.*\) has 1 images without a label, first image 1"):
        load_hub(str(tmp_path / "set"), "train")


def test_a_damaged_file_of_a_set_is_told(parquet):
    for path in Path(parquet).rglob("*.parquet"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UnreadableFile, match=r"`data` \(=.*set'\) cannot be opened by `datasets`: Parquet magic bytes"):
        load_hub(parquet, "train")


def test_the_length_of_an_epoch_is_described_or_given(parquet):
    with pytest.raises(ValueError, match=r"does not say how many images it has: give `images_per_epoch`"):
        ImageStream(parquet)
    assert len(ImageStream(parquet, images=10)) == 10
    load_hub(parquet, "train")  # which counts, and remembers
    assert len(ImageStream(parquet)) == IMAGES


def test_a_damaged_image_is_named():
    rows = datasets.Dataset.from_dict({"picture": [{"bytes": picture(1)[:30], "path": "half.png"}]})
    images = HubImages(rows, "picture", "set")
    with pytest.raises(OSError, match=r"cannot read image 0 \(half.png\)"):
        images[0]


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (2, 2), (3, 1)])
def test_a_stream_gives_every_image_once_with_views_of_its_own(parquet, world_size, workers):
    alone = {int(number): draw for number, draw in np.concatenate(batches_of(parquet, batch_size=1, last=IMAGES))}
    assert sorted(alone) == list(range(IMAGES))
    assert len(set(alone.values())) == IMAGES
    each = IMAGES // world_size // max(workers, 1) * max(workers, 1)
    seen = Counter()
    for rank in range(world_size):
        options = {"world_size": world_size, "rank": rank, "workers": workers, "batch_size": 1, "last": each}
        for number, draw in np.concatenate(batches_of(parquet, **options)):
            assert draw == alone[int(number)]  # whoever reads it
            seen[int(number)] += 1
    assert set(seen.values()) == {1}
    assert len(seen) >= IMAGES - world_size * max(workers, 1)


def test_another_epoch_has_another_order_and_other_views(parquet):
    first, second = (np.concatenate(batches_of(parquet, epoch=epoch, batch_size=24, last=1)) for epoch in (0, 1))
    assert first[:, 0].tolist() != second[:, 0].tolist()
    assert not set(first[:, 1]) & set(second[:, 1])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("first", [1, 2, 5])
def test_a_resumed_stream_continues_with_the_same_batches(parquet, workers, first):
    whole = batches_of(parquet, workers=workers, last=7)
    resumed = batches_of(parquet, workers=workers, last=7, first=first)
    np.testing.assert_array_equal(resumed, whole[first:])


def test_an_epoch_longer_than_a_part_goes_around(parquet):
    numbers = np.concatenate(batches_of(parquet, batch_size=10, last=5))[:, 0].astype(int)
    assert sorted(numbers[:IMAGES]) == sorted(numbers[IMAGES : 2 * IMAGES]) == list(range(IMAGES))


def test_an_unreadable_image_of_a_stream_is_replaced_with_a_warning(tmp_path):
    write_shard(tmp_path / "set", "train-00000-of-00001", [picture(1), picture(2)[:40], picture(3)], [0, 0, 0])
    with pytest.warns(UserWarning, match=r"cannot read train-00000-of-00001-1.png: .*; a grey image takes its place"):
        numbers = np.concatenate(batches_of(str(tmp_path / "set"), batch_size=1, last=3))[:, 0]
    assert sorted(numbers) == [1, 3, 124]


def test_load_images_opens_a_set_by_name(parquet):
    images = load_images("hub", "train", data=Path(parquet))
    assert (images.name, len(images), images.classes) == ("hub", IMAGES, ["even", "odd"])
    image, label = images[5]
    assert (number_of(image), label) == (5, 1)
    with pytest.raises(ValueError, match=r"`data` \(=None\) must be the name of an image set of the hub"):
        load_images("hub", "train")
