"""examples/swap_dino_head.py runs before and after the swap."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples/swap_dino_head.py"
LINE = re.compile(r"epoch (\d+): loss ([\d.]+) \(ln K = 5.545\), kappa ([\d.]+) to ([\d.]+)")


@pytest.mark.slow
@pytest.mark.parametrize("vmf", [False, True])
def test_trains_and_only_dino_vmf_learns_kappa(vmf):
    command = [sys.executable, "-W", "error", str(SCRIPT), "--epochs", "3", *(["--vmf"] if vmf else [])]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    epochs = [tuple(map(float, line)) for line in LINE.findall(result.stdout)]
    assert [epoch[0] for epoch in epochs] == [0, 1, 2]
    assert all(0 < loss < 6 for _, loss, _, _ in epochs)
    assert epochs[0][2:] == (10, 10), "the last layer is frozen in the first epoch"
    assert (epochs[-1][2] < epochs[-1][3]) is vmf


def test_the_lines_to_change_are_marked():
    """Head and loss, the norms, attach: nothing else of the loop mentions the library."""
    marked = [line for line in SCRIPT.read_text().splitlines() if "# vMF" in line]
    assert len(marked) == 3
    assert "VMFDINOHead, VMFDINOLoss" in marked[0]
    assert "norm_last_layer" in marked[1]
    assert "attach(student, teacher)" in marked[2]
