"""DINO-vMF in a LightningModule; Lightning wraps, saves and resumes.

    python examples/integrations/with_lightning.py --output runs/lightning --devices 2
    python examples/integrations/with_lightning.py --output runs/fsdp2 --devices 2 --strategy fsdp2

Needs `pip install lightning`.
"""

import argparse
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from toy import EPOCHS, Crops, ema, networks


class DINOvMF(lightning.LightningModule):
    """Student, teacher and loss are submodules, so Lightning moves and saves all three, the centre included."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher, self.loss = networks()
        self.losses: list[float] = []

    def configure_model(self) -> None:
        """Shard student and teacher where the strategy is Lightning's for FSDP2, and attach the loss to what results.

        DDP wraps this whole module later and leaves the submodules as they are.
        """
        sharded = isinstance(self.student, FSDPModule)  # Lightning may call this more than once
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not sharded:
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.student, mesh=mesh)
            # Without a backward pass, after which it would be sharded again, the teacher is at the end of its forward.
            fully_shard(self.teacher, mesh=mesh, reshard_after_forward=True)
        self.loss.attach(self.student, self.teacher)

    def train_dataloader(self) -> DataLoader:
        """Every process has its part of the images, in an order that Lightning tells the epoch."""
        images, processes = Crops(), self.trainer.world_size
        sampler = DistributedSampler(images, processes, self.trainer.global_rank, drop_last=True)
        return DataLoader(images, 64 // processes, sampler=sampler, drop_last=True)

    def on_train_epoch_start(self) -> None:
        """So that the crops of an epoch are the same after a resumption."""
        self.trainer.train_dataloader.dataset.epoch = self.current_epoch

    def training_step(self, crops: Tensor, batch_index: int) -> Tensor:
        """The loss of crops (B, 4, 1, 8, 8)."""
        by_crop = crops.transpose(0, 1)
        with torch.no_grad():
            targets = self.teacher(by_crop[:2].flatten(0, 1))
        value = self.loss(self.student(by_crop.flatten(0, 1)), targets, self.current_epoch)
        self.losses.append(value.item())
        return value

    def on_train_batch_end(self, *_: object) -> None:
        """The teacher follows."""
        ema(self.teacher, self.student)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The student learns; the teacher and the centre have no gradients."""
        return torch.optim.AdamW(self.student.parameters(), lr=1e-3)


def main(output: Path, *, devices: int = 1, strategy: str = "ddp", epochs: int = EPOCHS) -> list[float]:
    """Train up to `epochs` and return the losses of this process; a checkpoint in `output` is continued."""
    checkpoint = output / "last.ckpt"  # under FSDP2 a folder, to which every process writes its part
    shard = strategy == "fsdp2"
    trainer = lightning.Trainer(
        devices=devices,
        strategy=ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1) if shard else "auto",
        max_epochs=epochs,
        callbacks=[ModelCheckpoint(output, save_last=True, save_top_k=0)],
        use_distributed_sampler=False,  # the module's own is one
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = DINOvMF()
    trainer.fit(module, ckpt_path=checkpoint if checkpoint.exists() else None)
    return module.losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--devices", type=int, default=1, help="processes, one for each GPU or CPU core")
    parser.add_argument("--strategy", choices=("ddp", "fsdp2"), default="ddp")
    options = parser.parse_args()
    losses = main(options.output, devices=options.devices, strategy=options.strategy)
    print(f"{len(losses)} steps, the last loss {losses[-1]:.3f}" if losses else "nothing was left to do")
