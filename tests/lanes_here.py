"""Jobs of runtime.lanes in this process: their commands, without the seconds that each start of Python takes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import tyro

import evaluate
import pretrain
from runtime.lanes import Job


def run_lanes_here(lanes: Mapping[str, Sequence[Job]]) -> None:
    """Do every job by the function behind its command line; what real processes add is shown by the demo's test.

    Probes are fitted a few times instead of many times.
    """
    for job in [job for jobs in lanes.values() for job in jobs]:
        script, *arguments = job.command[1:]
        if Path(script).name == "pretrain.py":
            pretrain.main(tyro.cli(pretrain.Options, args=arguments, config=(tyro.conf.FlagCreatePairsOff,)))
        else:
            assert Path(script).name == "evaluate.py"
            few = ["--linear.cs", "0.0001", "--fewshot.draws", "2"] if arguments[0] == "all" else []
            evaluate.main([*arguments, *few])
