"""`python -m benchmarks mixture-fit` and `concentration`: every method from one start, and errors in eps."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from benchmarks.concentration.peers import PEERS
from benchmarks.concentration.run import _row, ours
from benchmarks.concentration.truth import load_truth
from benchmarks.mixture_fit.run import (
    EM,
    K_MEANS,
    ONLINE,
    PLAIN_EM,
    TEXTBOOK,
    TRUTH,
    Problem,
    measure,
    table,
)
from benchmarks.mixture_fit.spherecluster_process import spherecluster_em
from benchmarks.mixture_fit.textbook import textbook_em

from vmf_heads.mixture import VMFMixture, fit_vmf_mixture


def test_a_small_problem_has_every_method_and_em_fits_best() -> None:
    rows = list(measure(Problem("tiny", 4, 1200, 8, (10, 60), 2, 40, 2, 10, spherecluster=False)))
    first = {row["method"]: row for row in rows if row["seed"] == 0}
    assert set(first) == {EM, PLAIN_EM, ONLINE, K_MEANS, TEXTBOOK, TRUTH}
    for seed in (0, 1):
        fitted = {row["method"]: row["fitted"] for row in rows if row["seed"] == seed}
        assert fitted[EM] >= max(fitted.values()) - 1e-4
    assert first[PLAIN_EM]["fitted"] >= first[TEXTBOOK]["fitted"] - 1e-4
    assert first[TEXTBOOK]["passes"] == 10
    assert first[TRUTH]["kappa_error"] == 0
    lines = table({"rows": rows}).splitlines()[2:]
    assert len(lines) == 6
    for line in lines:
        _, _, method, *_, difference, _, _, _ = (cell.strip() for cell in line.split("|"))
        assert bool(difference) == (method != EM)
    textbook, ours = ([row["fitted"] for row in rows if row["method"] == method] for method in (TEXTBOOK, EM))
    mean = np.mean(np.subtract(textbook, ours))
    assert f"{mean:+.4f}".replace("-", "−") in next(line for line in lines if TEXTBOOK in line)


def problem_of_the_textbook() -> tuple[torch.Tensor, VMFMixture]:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(3, 256, generator=generator, dtype=torch.float64)
    kappa = torch.tensor([200.0, 300, 400], dtype=torch.float64)
    features, _ = VMFMixture(torch.tensor([1.0, 2, 3]), directions, kappa).sample(300, generator)
    return features, VMFMixture(torch.ones(3), directions + directions.roll(1, 0), kappa.flip(0))


def test_the_textbooks_em_is_ours_but_for_its_kappa() -> None:
    features, start = problem_of_the_textbook()
    textbook = textbook_em(features, start, 1, max_kappa=1e5)
    ours = fit_vmf_mixture(features, 3, init=start, max_iterations=2, tolerance=-1).mixture
    torch.testing.assert_close(textbook.weights, ours.weights, rtol=1e-10, atol=0)
    torch.testing.assert_close(textbook.directions, ours.directions, rtol=0, atol=1e-12)
    torch.testing.assert_close(textbook.kappa, ours.kappa, rtol=1e-3, atol=0)
    assert not torch.equal(textbook.kappa, ours.kappa)
    assert textbook_em(features, start, 1, max_kappa=250).kappa.max() == 250


def test_spherecluster_gets_the_start_and_returns_its_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that move known amounts stand in for the package; the process that would have it is this one."""
    steps = ModuleType("spherecluster.von_mises_fisher_mixture")
    steps._expectation = lambda features, directions, weights, kappa: (directions, weights, kappa)  # type: ignore
    steps._maximization = lambda features, posterior: (-posterior[0], posterior[1][::-1], posterior[2] + len(features))  # type: ignore
    monkeypatch.setitem(sys.modules, "spherecluster", ModuleType("spherecluster"))
    monkeypatch.setitem(sys.modules, steps.__name__, steps)

    def run(command: list[str], check: bool) -> SimpleNamespace:
        script = importlib.import_module(f"benchmarks.mixture_fit.{Path(command[3]).stem}")
        script.main(*map(str, command[4:]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    features, start = problem_of_the_textbook()
    mixture, seconds = spherecluster_em(Path("python"), features, start, passes=3)
    torch.testing.assert_close(mixture.directions, -start.directions)
    torch.testing.assert_close(mixture.weights, start.weights.flip(0))
    torch.testing.assert_close(mixture.kappa, start.kappa + 900)
    assert 0 <= seconds < 60


def test_errors_are_counted_in_eps_and_peers_are_what_they_say() -> None:
    truth = load_truth()[16, "resultant"]
    exact = _row("exact", truth, truth.kappa.high)
    assert exact["largest_eps"] <= 0.5
    assert exact["points"] == len(truth.argument)
    off = _row("off", truth, truth.kappa.high * (1 + 100 * 2.0**-52))
    assert 95 < off["largest_eps"] < 105
    assert off["beyond_4_eps"] == off["points"]
    middle = (truth.argument > 0.1) & (truth.argument < 0.9)
    argument = truth.argument[middle]
    for name, method in PEERS.items():
        np.testing.assert_allclose(method(argument, 16), ours(argument, 16), 2e-2, err_msg=name)
