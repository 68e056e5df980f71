"""`python -m benchmarks loss`: time and memory of DINO's loss, with and without its logits."""

import torch

from benchmarks import results
from benchmarks.loss import figures, measure, peers, report
from benchmarks.loss.inputs import QUICK, SIZES


def loss(*, device: str = "cpu", threads: int = 2, autocast: bool = False, quick: bool = False) -> None:
    """Time prototype_cross_entropy beside plain DINO, a compiled DINO, other libraries and its own matrix products.

    Writes benchmarks/results/loss_*.json; on the CPU also docs/images/loss_*.svg and the tables of docs/loss.md. Takes
    about ten minutes on two quiet CPU cores and 6 GB. lightly, DINOv2 and Liger take part where they are installed;
    the first two also from checkouts in a folder that VMF_HEADS_UPSTREAM names.

    Args:
        device: cpu or cuda; each has its own sizes.
        threads: CPU threads.
        autocast: run under bfloat16 autocast; on a GPU only.
        quick: small sizes and few rounds, printed and not written.
    """
    if autocast and device == "cpu":
        raise ValueError("`autocast` (=True) needs `device` (='cpu') to be cuda: on the CPU the loss stays in float32")
    torch.set_num_threads(threads)
    rows = measure.measure(QUICK if quick else SIZES[device], device, autocast=autocast, quick=quick)
    print(report.size_tables(rows))
    print(report.lost(rows))
    if quick:
        return
    growth = measure.memory_by_batch(device, autocast=autocast)
    name = "loss_bfloat16" if autocast else "loss"
    print(results.write(name, device, rows, peers=peers.versions(), growth=growth))
    if device == "cpu":
        figures.draw()
        report.update_docs()
