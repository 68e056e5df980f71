"""The loss beside its contenders, in one dtype a process, and the fused loss with chunks of several sizes."""

from typing import Any

from benchmarks import results
from benchmarks.gpu.job import Job
from benchmarks.loss import contenders, measure, peers
from benchmarks.loss.inputs import Size

VIT_S, VIT_B = Size("ViT-S/16", 10, 64, 65536), Size("ViT-B/16", 12, 128, 65536)
DINOV2, IBOT = Size("DINOv2", 10, 64, 131072), Size("iBOT", 0, 25088, 8192)
TINY, TINY_PATCHES = Size("crops", 4, 8, 512, 32), Size("patches", 0, 64, 512, 32)

# (size, whether from the head's parameters), what matters most first: time may end before the list does.
CASES = {
    "bfloat16": [(VIT_S, True), (IBOT, True), (VIT_B, True), (VIT_S, False), (DINOV2, True), (IBOT, False)],
    "float32": [(VIT_S, True), (IBOT, True), (VIT_S, False), (VIT_B, True)],
}
REHEARSED = [(TINY, True), (TINY_PATCHES, True)]
MEBIBYTES = (32, 64, 128, 256, 512, 1024)
"""The budgets of a chunk that are compared, in MiB of float32 logits."""
REHEARSED_MEBIBYTES = (1, 2)


def file_name(benchmark: str, dtype: str) -> str:
    """What a benchmark's result file in this dtype is called; float32 is not mentioned."""
    return benchmark if dtype == "float32" else f"{benchmark}_{dtype}"


def run(job: Job, dtype: str) -> list[str]:
    """Measure every case, and memory against the number of images.

    Returns what failed: cases as a whole, or the fused loss in them. Others may fail.
    """
    cases = REHEARSED if job.is_rehearsal else CASES[dtype]
    settings: dict[str, Any] = {"dtype": dtype, "peers": peers.versions(), "cases": len(cases)}
    rows: list[dict[str, Any]] = []
    failed = []
    if not job.is_rehearsal and dtype == "bfloat16":
        try:
            settings["growth"] = measure.memory_by_batch(job.device, autocast=True)
        except Exception as error:  # no memory for the largest batch of plain DINO
            failed.append(f"memory by batch: {_in_a_line(error)}")
    for measured, (size, weight_norm) in enumerate(cases):
        if job.is_over():
            print(f"No time was left for {len(cases) - measured} of {len(cases)} cases.")
            break
        case = {"size": size, "device": job.device, "weight_norm": weight_norm, "autocast": dtype != "float32"}
        try:
            found = measure.measure_case(**case, quick=job.is_rehearsal, deadline=job.deadline)
            rows += found
            ours = [row for row in found if row["contender"] == contenders.FUSED and "missing" in row]
            failed += [f"{row['contender']}, {row['size']}, {row['start']}: {row['missing']}" for row in ours]
        except Exception as error:
            failed.append(f"{size}, {measure.STARTS[weight_norm]}: {_in_a_line(error)}")
        results.write(file_name("loss", dtype), job.device, rows, folder=job.results, failed=failed, **settings)
    return failed


def run_chunks(job: Job) -> list[str]:
    """Measure the fused loss at two shapes for every budget of a chunk; returns what failed."""
    sizes = (TINY, TINY_PATCHES) if job.is_rehearsal else (VIT_B, IBOT)
    rows: list[dict[str, Any]] = []
    failed = []
    for dtype in ("float32",) if job.is_rehearsal else ("bfloat16", "float32"):
        for size in sizes:
            if job.is_over():
                return failed
            budgets = REHEARSED_MEBIBYTES if job.is_rehearsal else MEBIBYTES
            options = {"autocast": dtype != "float32", "quick": job.is_rehearsal}
            try:
                found = measure.measure_chunks(size, job.device, budgets, **options)
                rows += [{"dtype": dtype} | row for row in found]
            except Exception as error:
                failed.append(f"{size}, {dtype}: {_in_a_line(error)}")
            results.write("chunks", job.device, rows, folder=job.results, failed=failed)
    return failed


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
