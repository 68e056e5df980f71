"""DINO-vMF in a loop of Hugging Face's accelerate, which wraps, saves and resumes.

    accelerate launch examples/integrations/with_accelerate.py --output runs/accelerate

Needs `pip install accelerate`.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from toy import EPOCHS, Crops, ema, networks


def main(output: Path, *, micro_batches: int = 1, epochs: int = EPOCHS) -> list[float]:
    """Train up to `epochs` and return the losses of this process; a checkpoint in `output` is continued."""
    accelerator = Accelerator(gradient_accumulation_steps=micro_batches)
    student, teacher, loss = networks()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    images = Crops()
    batch_size = 64 // micro_batches // accelerator.num_processes
    loader = DataLoader(images, batch_size, shuffle=True, drop_last=True)
    student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    teacher, loss = teacher.to(accelerator.device), loss.to(accelerator.device)
    loss.attach(student, teacher)  # after the student is wrapped
    accelerator.register_for_checkpointing(teacher, loss)  # `prepare` did so for the others

    first = 0
    if output.exists():
        accelerator.load_state(output)
        first = int((output / "epoch.txt").read_text()) + 1

    losses = []
    for epoch in range(first, epochs):
        loader.set_epoch(epoch)
        images.epoch = epoch
        for crops in loader:  # (B, 4, 1, 8, 8)
            by_crop = crops.transpose(0, 1)
            with accelerator.accumulate(student):
                with torch.no_grad():
                    targets = teacher(by_crop[:2].flatten(0, 1))
                # The centre moves once a step, by the average over all micro-batches.
                commit = accelerator.sync_gradients
                value = loss(student(by_crop.flatten(0, 1)), targets, epoch, commit=commit)
                accelerator.backward(value)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                ema(teacher, accelerator.unwrap_model(student))
            losses.append(value.item())
        accelerator.save_state(output)
        if accelerator.is_main_process:
            (output / "epoch.txt").write_text(str(epoch))
        accelerator.print(f"epoch {epoch}: loss {losses[-1]:.3f}")
    accelerator.end_training()
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--micro-batches", type=int, default=1, help="of which gradients are accumulated in each step")
    options = parser.parse_args()
    main(options.output, micro_batches=options.micro_batches)
