"""DINO-vMF in a plain PyTorch loop, with DDP or FSDP2, that goes on where it was stopped.

    python examples/integrations/plain_torchrun.py --output runs/plain
    torchrun --nproc-per-node 2 examples/integrations/plain_torchrun.py --output runs/plain --strategy fsdp2

The checkpoint of one strategy and number of processes continues under any other.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from toy import EPOCHS, Crops, ema, networks


def main(output: Path, *, strategy: str = "ddp", batch_size: int = 64, epochs: int = EPOCHS) -> list[float]:
    """Train up to `epochs` and return the losses of this process; a checkpoint in `output` is continued."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processes = dist.get_world_size() if dist.is_initialized() else 1

    student, teacher, loss = (module.to(device) for module in networks())
    wrapped: nn.Module = student
    if processes > 1 and strategy == "fsdp2":
        fully_shard(student)
        fully_shard(teacher, reshard_after_forward=True)  # it has no backward, after which it would be sharded again
    elif processes > 1:
        wrapped = DistributedDataParallel(student)
    loss.attach(wrapped, teacher)  # after both are wrapped
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)

    images = Crops()
    sampler = DistributedSampler(images, processes, dist.get_rank() if processes > 1 else 0, drop_last=True)
    loader = DataLoader(images, batch_size // processes, sampler=sampler, drop_last=True)

    def state(epoch: int) -> dict[str, Any]:
        of_student, of_optimizer = get_state_dict(student, optimizer)
        of_teacher = get_model_state_dict(teacher)
        return {
            "student": of_student,
            "optimizer": of_optimizer,
            "teacher": of_teacher,
            "loss": loss.state_dict(),  # the centre
            "epoch": torch.tensor(epoch),
        }

    first = 0
    whole = [path.parent for path in output.glob("epoch*/.metadata")]  # which is written last
    if whole:
        saved = state(0)
        dcp.load(saved, checkpoint_id=max(whole, key=lambda path: int(path.name.removeprefix("epoch"))))
        set_state_dict(student, optimizer, model_state_dict=saved["student"], optim_state_dict=saved["optimizer"])
        set_model_state_dict(teacher, saved["teacher"])
        loss.load_state_dict(saved["loss"])
        first = int(saved["epoch"]) + 1

    losses = []
    for epoch in range(first, epochs):
        sampler.set_epoch(epoch)
        images.epoch = epoch
        for crops in loader:  # (B, 4, 1, 8, 8)
            by_crop = crops.to(device).transpose(0, 1)
            with torch.no_grad():
                targets = teacher(by_crop[:2].flatten(0, 1))
            value = loss(wrapped(by_crop.flatten(0, 1)), targets, epoch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            ema(teacher, student)
            losses.append(value.item())
        dcp.save(state(epoch), checkpoint_id=output / f"epoch{epoch}")
        print(f"epoch {epoch}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoints, one for each epoch")
    parser.add_argument("--strategy", choices=("ddp", "fsdp2"), default="ddp")
    options = parser.parse_args()
    if under_torchrun := dist.is_torchelastic_launched():
        if torch.cuda.is_available():
            torch.cuda.set_device(dist.get_node_local_rank())
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    main(options.output, strategy=options.strategy)
    if under_torchrun:
        dist.barrier()
        dist.destroy_process_group()
