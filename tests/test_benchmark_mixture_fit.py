"""`python -m benchmarks mixture-fit` and `concentration`: every method from one start, and errors in eps."""

import numpy as np
from benchmarks.concentration.peers import PEERS
from benchmarks.concentration.run import _row, ours
from benchmarks.concentration.truth import load_truth
from benchmarks.mixture_fit.run import EM, K_MEANS, ONLINE, TRUTH, Problem, measure, table


def test_a_small_problem_has_every_method_and_em_fits_best() -> None:
    rows = measure(Problem("tiny", 4, 1200, 8, (10, 60), seeds=1, passes=40, online_passes=2))
    fitted = {row["method"]: row["fitted"] for row in rows}
    assert set(fitted) == {EM, ONLINE, K_MEANS, TRUTH}
    assert fitted[EM] >= max(fitted[ONLINE], fitted[K_MEANS]) - 1e-3
    assert next(row for row in rows if row["method"] == TRUTH)["kappa_error"] == 0
    assert table({"rows": rows}).count("\n| tiny |") == 4


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
