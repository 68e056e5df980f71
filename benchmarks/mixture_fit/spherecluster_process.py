"""Runs EM of spherecluster2, which needs an environment of its own, on a problem of ours."""

import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from vmf_heads.mixture import VMFMixture

SCRIPT = Path(__file__).with_name("spherecluster_em.py")


def spherecluster_em(python: Path, features: Tensor, start: VMFMixture, passes: int) -> tuple[VMFMixture, float]:
    """The mixture after so many passes from `start`, and the CPU seconds they took in the interpreter `python`."""
    with TemporaryDirectory() as folder:
        problem, result = Path(folder, "problem.npz"), Path(folder, "result.npz")
        given = {name: tensor.numpy() for name, tensor in vars(start).items()}
        np.savez(problem, features=features.numpy(), passes=np.array(passes), **given)
        subprocess.run([python, "-W", "ignore", SCRIPT, problem, result], check=True)
        with np.load(result) as found:
            mixture = VMFMixture(*(torch.from_numpy(found[name]) for name in ("weights", "directions", "kappa")))
            return mixture, float(found["cpu_seconds"])
