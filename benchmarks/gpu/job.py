"""What a stage of `python -m benchmarks gpu` is told: where it computes, where its files go, and when to stop."""

import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
REHEARSAL = ROOT / "runs" / "gpu_rehearsal"


@dataclass(frozen=True)
class Job:
    """`root` has the layout of the repository, of which only what is written exists: on the CPU nothing is kept.

    A stage that has measured until `deadline`, in seconds of time.monotonic(), begins nothing more.
    """

    device: str
    root: Path
    deadline: float

    @property
    def is_rehearsal(self) -> bool:
        """Whether tiny sizes on a CPU stand in for what a GPU does."""
        return self.device == "cpu"

    @property
    def results(self) -> Path:
        """The folder of the result files."""
        return self.root / "benchmarks" / "results"

    @property
    def images(self) -> Path:
        """The folder of the figures."""
        return self.root / "docs" / "images"

    def is_over(self) -> bool:
        """Whether no time is left."""
        return time.monotonic() > self.deadline
