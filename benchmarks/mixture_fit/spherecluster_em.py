"""EM of spherecluster2 in the interpreter that has it: `PYTHON spherecluster_em.py PROBLEM.npz RESULT.npz`.

The package wants an older scikit-learn, so that it has an environment of its own; nothing else is imported here. Its
estimator begins with kappa = 1 for every component, whatever the centres are: so that it starts where the others do,
its two steps are called.
"""

import sys
import time

import numpy as np
from spherecluster.von_mises_fisher_mixture import _expectation, _maximization


def main(problem: str, result: str) -> None:
    """Read features, start and passes; write the mixture and the CPU seconds."""
    given = np.load(problem)
    features = given["features"].astype(np.float64)
    directions, weights, kappa = (given[name].astype(np.float64) for name in ("directions", "weights", "kappa"))
    began = time.process_time()
    for _ in range(int(given["passes"])):
        posterior = _expectation(features, directions, weights, kappa)
        directions, weights, kappa = _maximization(features, posterior)
    seconds = time.process_time() - began
    np.savez(result, directions=directions, weights=weights, kappa=kappa, cpu_seconds=seconds)


if __name__ == "__main__":
    main(*sys.argv[1:])
