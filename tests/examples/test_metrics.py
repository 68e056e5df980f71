"""What is logged, and where it goes."""

import json
import math
from pathlib import Path

import pytest
import torch

from methods.statistics import center_entropy, kappa_statistics, target_statistics
from training.log import METRICS, MetricsLog, mean_statistics
from vmf_heads.centering import LogitCentering, ProbabilityCentering


def test_entropies_of_spread_shared_and_split_targets() -> None:
    uniform = torch.full((6, 8), 1 / 8)
    one, own = torch.eye(8)[[0] * 8], torch.eye(8)
    loss = torch.tensor(3.0)
    cases = [(uniform, math.log(8), math.log(8), 1), (one, 0, 0, 1), (own, 0, math.log(8), 8)]
    for targets, entropy, marginal, used in cases:
        statistics = target_statistics(targets, loss)
        assert statistics["target_entropy"].item() == pytest.approx(entropy, abs=1e-6)
        assert statistics["marginal_entropy"].item() == pytest.approx(marginal, abs=1e-6)
        assert statistics["kl"].item() == pytest.approx(3 - entropy, abs=1e-6)
        assert statistics["prototypes_used"].item() == used


def test_quantiles_of_kappa() -> None:
    statistics = kappa_statistics(torch.arange(101.0)[torch.randperm(101)])
    expected = {"kappa_min": 0, "kappa_p05": 5, "kappa_p50": 50, "kappa_p95": 95, "kappa_max": 100}
    assert {name: value.item() for name, value in statistics.items()} == pytest.approx(expected)


def test_a_centre_of_logits_and_one_of_log_probabilities_have_the_same_entropy() -> None:
    half = torch.tensor([0.5, 0.5, 1e-30, 1e-30]).log()
    centerings = (ProbabilityCentering(4), LogitCentering((1, 4), 0.9))
    assert [center_entropy(centering, 0.04).item() for centering in centerings] == pytest.approx([math.log(4)] * 2)
    centerings[0].log_center.copy_(half)
    centerings[1].center.copy_(0.04 * half)
    assert [center_entropy(centering, 0.04).item() for centering in centerings] == pytest.approx([math.log(2)] * 2)


def test_statistics_of_micro_batches_are_averaged() -> None:
    found, signal = mean_statistics(
        [{"loss": torch.tensor(1.0), "temp": 0.04}, {"loss": torch.tensor(4.0), "temp": 0.04}]
    )
    assert found == {"loss": 2.5, "temp": 0.04}
    assert signal == 0


def test_rows_of_steps_after_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    whole = [json.dumps({"step": step, "loss": 1.0}) for step in (2, 4, 6)]
    (tmp_path / METRICS).write_text("\n".join(whole) + '\n{"step": 8, "lo')  # as a killed process leaves it
    log = MetricsLog(tmp_path, step=5)
    log.write({"step": 6, "loss": 2.0})
    log.close()
    assert (tmp_path / METRICS).read_text().splitlines() == [*whole[:2], '{"step": 6, "loss": 2.0}']


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for step in (2, 1):  # interrupted after step 2, whose checkpoint was of step 1
        log = MetricsLog(tmp_path, step=step - 1, curves=True)
        for later in range(step, 4):
            log.write({"step": later, "loss": 0.5 * later})
        log.close()
    curves = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert sorted((event.step, event.value) for event in curves) == [(1, 0.5), (2, 1.0), (3, 1.5)]
