"""The normaliser on a device: the error of its operations and of its kernels, then their speed."""

from benchmarks import results
from benchmarks.gpu.job import Job
from benchmarks.normalizer import accuracy, speed

COMPILED = (256,)
"""The dimensions whose kernels are scored; each costs six compilations."""


def run(job: Job) -> list[str]:
    """Score and time it, without the peers, which know only the CPU; errors end the stage."""
    rows = accuracy.measure_ours(job.device, accuracy.QUICK if job.is_rehearsal else None, compiled=False)
    results.write("normalizer_accuracy", job.device, rows, folder=job.results)
    if job.is_rehearsal:  # the rest is a minute of C++ compilers
        return []
    rows += accuracy.measure_ours(job.device, COMPILED, compiled=True)
    results.write("normalizer_accuracy", job.device, rows, folder=job.results)
    if not job.is_over():
        timings = speed.measure(job.device, quick=False)
        settings = {"elements": speed.ELEMENTS, "p": speed.DIMENSION}
        results.write("normalizer_speed", job.device, timings, folder=job.results, **settings)
    return []
