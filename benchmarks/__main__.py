"""`python -m benchmarks NAME [options]`; every benchmark writes its figures to benchmarks/results/."""

import tyro

from benchmarks.loss import loss
from benchmarks.normalizer import normalizer

COMMANDS = {"normalizer": normalizer, "loss": loss}

if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="python -m benchmarks")
