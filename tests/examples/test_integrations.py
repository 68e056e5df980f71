"""examples/integrations: what was interrupted goes on with the same losses, and several processes train as one."""

import importlib
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gloo import run_on_ranks

SCRIPTS = Path(__file__).parents[2] / "examples" / "integrations"

# Of Lightning and accelerate about what they depend on; of torch, that one process saves alone.
pytestmark = pytest.mark.filterwarnings("ignore")


def script(name: str) -> Any:
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))  # as for a script that is run
    return importlib.import_module(name)


def use_cpus(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def _same_device_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    use_cpus(monkeypatch)


@pytest.mark.parametrize("name", ["plain_torchrun", "with_lightning", "with_accelerate"])
def test_an_interrupted_training_goes_on_with_the_same_losses(name: str, tmp_path: Path) -> None:
    if name != "plain_torchrun":
        pytest.importorskip(name.removeprefix("with_"))
    main = script(name).main
    whole = main(tmp_path / "whole", epochs=2)
    parts = main(tmp_path / "parts", epochs=1) + main(tmp_path / "parts", epochs=2)
    assert len(whole) == 2 * (1797 // 64)
    assert parts == whole
    assert main(tmp_path / "parts", epochs=2) == []


def of_rank(rank: int) -> dict[str, list[float]]:
    return losses_under_either_strategy(rank, "plain_torchrun")


def of_lightning_rank(rank: int) -> dict[str, list[float]]:
    os.environ["LOCAL_RANK"] = str(rank)  # so Lightning starts no processes
    warnings.simplefilter("ignore")
    return losses_under_either_strategy(rank, "with_lightning", devices=2)


def losses_under_either_strategy(rank: int, name: str, **options: int) -> dict[str, list[float]]:
    """The losses of a rank under DDP for one epoch, and under FSDP2 for two with an interruption between them."""
    with pytest.MonkeyPatch.context() as patch:
        use_cpus(patch)
        main = script(name).main
        folder = [tempfile.mkdtemp() if rank == 0 else ""]
        dist.broadcast_object_list(folder)
        output = Path(folder[0])
        losses = {"ddp": main(output / "ddp", strategy="ddp", epochs=1, **options)}
        first, second = (main(output / "fsdp2", strategy="fsdp2", epochs=n, **options) for n in (1, 2))
        losses["fsdp2, and fsdp2 resumed"] = first + second
        if name == "plain_torchrun":  # Lightning's checkpoints of the two are not alike
            losses["ddp, then fsdp2"] = losses["ddp"] + main(output / "ddp", strategy="fsdp2", epochs=2, **options)
        dist.barrier()
        if rank == 0:
            shutil.rmtree(output)
        return losses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "function"),
    [("plain_torchrun", of_rank), ("with_lightning", of_lightning_rank)],
    ids=["plain", "lightning"],
)
def test_two_processes_have_the_losses_of_one_under_either_strategy(
    name: str, function: Callable[[int], dict[str, list[float]]], tmp_path: Path
) -> None:
    if name == "with_lightning":
        pytest.importorskip("lightning")
    alone = torch.tensor(script(name).main(tmp_path, epochs=2))
    ranks = run_on_ranks(function)
    assert len(ranks[0]["fsdp2, and fsdp2 resumed"]) == len(alone)
    for run in ranks[0]:
        mean = torch.tensor([of_rank[run] for of_rank in ranks]).mean(0)
        torch.testing.assert_close(mean, alone[: len(mean)], rtol=1e-3, atol=0, msg=lambda m, run=run: f"{run}: {m}")


@pytest.mark.slow
def test_accelerate_trains_the_same_with_micro_batches(tmp_path: Path) -> None:
    """The centre and the gradients of two micro-batches are those of the batch."""
    pytest.importorskip("accelerate")
    main = script("with_accelerate").main
    whole = torch.tensor(main(tmp_path / "whole", epochs=1))
    halves = torch.tensor(main(tmp_path / "halves", micro_batches=2, epochs=1)).unflatten(0, (-1, 2)).mean(1)
    torch.testing.assert_close(halves[0], whole[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(halves, whole, rtol=1e-2, atol=0)
