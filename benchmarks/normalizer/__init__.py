"""`python -m benchmarks normalizer`: accuracy and speed of log C_p(kappa), ours and others'."""

import torch

from benchmarks import results
from benchmarks.normalizer import accuracy, figures, report, speed


def normalizer(*, device: str = "cpu", accuracy_only: bool = False, quick: bool = False) -> None:
    """Score log_vmf_normalizer against exact values and time it beside SciPy, the paper's formula, mpmath and TFP.

    Writes benchmarks/results/normalizer_*.json; on the CPU also docs/images/normalizer_*.svg and the tables in
    docs/numerics.md. The whole takes about five minutes on one quiet CPU core.

    Args:
        device: where our implementation and the paper's formula run; the other peers know only the CPU.
        accuracy_only: keep the last timings; they mean something only on a machine that does nothing else.
        quick: a few dimensions and short timings, printed and not written.
    """
    torch.set_num_threads(1)
    rows = accuracy.measure(device, quick=quick)
    print(report.method_table(rows), report.training_table(rows), sep="\n\n")
    timings = [] if accuracy_only else speed.measure(device, quick=quick)
    if timings:
        print(report.speed_table(timings))
    if quick:
        return
    print(results.write("normalizer_accuracy", device, rows))
    if timings:
        print(results.write("normalizer_speed", device, timings, elements=speed.ELEMENTS, p=speed.DIMENSION))
    if device == "cpu":
        figures.draw()
        report.update_docs()
