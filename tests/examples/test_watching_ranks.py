"""Ranks that share the weights out, and the images to look at, see what one process sees."""

import tempfile
from pathlib import Path

import pytest

from gloo import run_on_ranks
from training.parallel import parallelize
from watched_run import folder_without_val, pictures, tiny_method
from watching.watcher import Watcher


def look_on_this_rank(_rank: int) -> dict[str, float]:
    recipe, method = tiny_method()
    parallelize(method, strategy="fsdp2")
    with tempfile.TemporaryDirectory() as folder:
        watcher = Watcher(pictures(80), recipe, folder_without_val(Path(folder)), every=1)
    return watcher.look(method)


def test_the_main_rank_under_fsdp2_sees_what_one_process_sees(tmp_path: Path) -> None:
    main, other = run_on_ranks(look_on_this_rank)
    assert other == {}
    recipe, method = tiny_method()
    alone = Watcher(pictures(80), recipe, folder_without_val(tmp_path), every=1).look(method)
    assert main == pytest.approx(alone, rel=1e-4)
