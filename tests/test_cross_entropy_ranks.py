"""Two ranks are one process, for every shape: loss, gradients and centre, also where a rank has no rows at all."""

from typing import Any

import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cross_entropy_problems import gradients, problem
from gloo import run_on_ranks
from vmf_heads import ProbabilityCentering, prototype_cross_entropy

EXAMPLES = 40
# Every rank draws the same examples.
same = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@st.composite
def shared_problems(draw: st.DrawFn) -> tuple[dict[str, Any], tuple[int, int]]:
    """Arguments of one process, and the (student rows, teacher rows) of them that the first of two ranks has."""
    same_position = draw(st.booleans())
    student_rows = draw(st.integers(1, 9))
    teacher_rows = student_rows if same_position else draw(st.integers(1, 9))
    k, p = draw(st.integers(1, 12)), draw(st.integers(2, 9))
    columns = 1 if same_position else draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 1000)))
    shape = (student_rows, teacher_rows, k, p, columns)
    arguments = problem(shape, scales=draw(st.booleans()), same_position=same_position)
    arguments["batch_chunk_size"] = draw(st.sampled_from([None, 1, 2, 7]))
    students = draw(st.integers(0, student_rows))
    teachers = students if same_position else draw(st.integers(0, teacher_rows))
    if not same_position:  # a rank trains its student's rows towards its own teacher's rows alone
        pairs = arguments["teacher_rows"]
        of_second = torch.arange(student_rows)[:, None] >= students
        arguments["teacher_rows"] = torch.where((pairs >= teachers) == of_second, pairs, -1)
    return arguments, (students, teachers)


def part_of_rank(arguments: dict[str, Any], first: tuple[int, int], rank: int) -> dict[str, Any]:
    """The rows of one rank, with its teacher's rows counted from 0."""
    students, teachers = (slice(cut, None) if rank else slice(0, cut) for cut in first)
    part = {
        "student": arguments["student"]._replace(features=arguments["student"].features[students]),
        "teacher": arguments["teacher"]._replace(features=arguments["teacher"].features[teachers]),
        "weights": arguments["weights"][students],
    }
    if arguments["teacher_rows"] is not None:
        pairs = arguments["teacher_rows"][students]
        part["teacher_rows"] = torch.where(pairs >= 0, pairs - rank * first[1], -1)
    return arguments | part


def results(arguments: dict[str, Any], wanted: dict[str, Any], group: Any) -> list[Tensor]:
    """Loss, gradients of what `wanted` holds, and the centre after a step, summed and averaged over a group."""
    loss, log_sum, _ = prototype_cross_entropy(**arguments)
    of = list(gradients(loss, wanted).values())
    summed = torch.cat([tensor.detach().flatten() for tensor in (loss, *of)])
    dist.all_reduce(summed, group=group)
    centering = ProbabilityCentering(len(log_sum), process_group=group).double()
    centering.log_center.copy_(arguments["log_center"])
    centering.accumulate_log_sum_(log_sum, len(arguments["teacher"].features))
    centering.commit_()
    return [summed, centering.log_center]


def examples_of_rank(rank: int) -> list[int]:
    """[examples that were equal, those in which a rank had no row of the student]."""
    alone = [dist.new_group([number]) for number in range(2)][rank]
    examples: list[tuple[dict[str, Any], tuple[int, int]]] = []
    same(
        given(shared_problems())(lambda example: examples.append(example))
    )()  # drawn first: hypothesis may call a function again as it likes
    empty = 0
    for arguments, first in examples:
        want = results(arguments, arguments, alone)
        got = results(part_of_rank(arguments, first, rank), arguments, dist.group.WORLD)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        empty += first[0] in (0, len(arguments["student"].features))
    return [len(examples), empty]


def test_two_ranks_are_one_process_for_every_shape() -> None:
    first, second = run_on_ranks(examples_of_rank)
    assert first == second
    assert first[0] >= EXAMPLES
    assert first[1] > 5
