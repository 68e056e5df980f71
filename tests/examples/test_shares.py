"""Protocols whose work the ranks divide give the numbers of one process."""

import dataclasses
import tempfile
from pathlib import Path

import pytest

from davis_folder import write_davis
from evaluators.dense.segmentation.segmentation import SegmentationOptions, segmentation
from evaluators.dense.video.segmentation import VideoOptions, video_segmentation
from evaluators.protocol import Evaluation
from evaluators.retrieval.retrieval import RetrievalOptions, retrieval
from gloo import run_on_ranks
from landmark_folder import write_landmarks
from mask_folder import write_masked
from patch_encoder import PatchEncoder
from runtime.distributed import on_main
from runtime.shares import gather, share
from storage.torch_file import UnreadableFile

SEQUENCES = {"one": [(1, 2)], "two": [(0, 1), (4, 8)], "three": [(2, 0)]}


def numbers_of(rank: int) -> dict[str, float]:
    """All metrics of three protocols and the order in which items come back; each rank writes its own files."""
    with tempfile.TemporaryDirectory() as folder:
        data = write_davis(Path(folder), SEQUENCES)
        write_landmarks(data, "roxford5k")
        evaluation = Evaluation(PatchEncoder(8), lambda split: None, "test", data, None, Path(folder, "output"))
        metrics = [*retrieval(evaluation, RetrievalOptions(datasets=("roxford5k",), image_size=48, num_workers=0))]
        metrics += video_segmentation(evaluation, VideoOptions(side=64, radius=1))
        evaluation.encoder.image_size = 16
        few = SegmentationOptions(k=3, cs=(1e-3, 1e-1), bank=40, num_workers=0)
        masked = dataclasses.replace(evaluation, data=write_masked(Path(folder, "masked"), counts={"train": 20}))
        metrics += segmentation(masked, few)
        written = len(list(Path(folder, "output").glob("*.csv")))
    order = gather([10 * item for item in share(range(5))])
    of_main = {"main": on_main(lambda: f"rank {rank}"), "error": error_of_main(rank)}
    return {metric.name: metric.value for metric in metrics} | {"written": written, "order": order} | of_main


def error_of_main(rank: int) -> str:
    def fail() -> None:
        raise UnreadableFile(f"rank {rank} failed")

    try:
        on_main(fail)
    except UnreadableFile as error:
        return str(error)
    return "none"


def test_two_ranks_give_the_numbers_of_one():
    alone, (first, second) = numbers_of(0), run_on_ranks(numbers_of)
    assert len(alone) == 8 + 7 + 4 + 2 + 2
    assert alone.pop("written") == first.pop("written") == 1
    assert second.pop("written") == 0, "only the main rank writes"
    assert alone.pop("order") == first.pop("order") == second.pop("order") == [0, 10, 20, 30, 40]
    for found in (alone, first, second):
        assert (found.pop("main"), found.pop("error")) == ("rank 0", "rank 0 failed")
    assert first == second == pytest.approx(alone, abs=1e-12)
    assert 0 < alone["J-Mean"] < 1
