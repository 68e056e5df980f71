"""Whether a loss is given what its heads returned, found out once, at the loss's first call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ._matmul import at_least_float32
from .head import PrototypeHead

# Of each row that many columns are compared, and after that many calls of the head nothing is remembered any more.
COLUMNS, CALLS = 64, 16
# The output may have been rounded to half precision on its way; rows of another head differ by more in some column.
TOLERANCE = 1e-2


class FirstOutputs:
    """Remembers the rows that a head returns until the loss that is attached to it is first called.

    A loss reads log C_p from the head that it is attached to. If the output comes from another one, of the same model
    or of a copy, the loss is a finite number and wrong. The comparison costs one synchronisation with the device, and
    that once. A head that runs inside torch.compile is not checked.

    Args:
        head: the head.
        whose: "student" or "teacher", for the messages.
    """

    def __init__(self, head: PrototypeHead, whose: str) -> None:
        self.whose = whose
        self.rows: list[Tensor] = []
        self.calls = 0
        self.unknown = False  # whether there were calls whose rows are not here
        self.any_requires_grad = False
        self._hook = head.register_forward_hook(self)

    def __call__(self, head: PrototypeHead, args: Any, output: Any) -> None:
        """The forward hook."""
        if torch.compiler.is_compiling():
            self.unknown = True
            return
        if self.calls == CALLS:
            self.unknown = True
            self.stop()
            return
        self.calls += 1
        for tensor in _tensors(output):
            self.any_requires_grad |= tensor.requires_grad
            self.rows.append(tensor.detach().flatten(0, -2)[:, :COLUMNS].clone())

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _no_hook, ()  # in a copy of the head, which is not attached

    def stop(self) -> None:
        """Remember nothing from now on."""
        self._hook.remove()
        self.rows = []

    def compare(self, output: Tensor) -> None:
        """Raise RuntimeError if these rows (..., K) cannot be the head's, and warn if the head did not run."""
        if self.unknown:
            return
        if not self.calls:
            warnings.warn(
                f"the {self.whose}'s head did not run between `attach` and the first call of the loss. If what the "
                "loss was given came from another head, or from a copy of the model, its log C_p is that of other "
                "prototypes: attach the loss to the models that run",
                UserWarning,
                stacklevel=2,
            )
            return
        if self.returned(output) is False:
            raise RuntimeError(
                f"the {self.whose}'s output did not come from the {self.whose}'s head that this loss is attached to: "
                "that head returned other rows. Attach the loss to the head whose output it is given; where a model "
                "holds several, `head=` of `attach` names one"
            )

    def returned(self, output: Tensor) -> bool | None:
        """Whether these rows (..., K) are the head's, judged by two of them; None if it returned none of this width."""
        given = output.detach().flatten(0, -2)[:, :COLUMNS]
        blocks = [block.to(given) for block in self.rows if block.shape[1] == given.shape[1]]
        if not blocks:
            return None
        return all(any(_contains(block, row) for block in blocks) for row in given[[0, -1]])


def check_order(student: FirstOutputs, teacher: FirstOutputs, given: Tensor) -> None:
    """Raise RuntimeError if the heads' outputs show that student and teacher were exchanged.

    Either what the student's head returned has no gradients and what the teacher's returned has; or the teacher's has
    not run yet, and the rows `given` as its own are the student's.
    """
    ran = student.calls and not student.unknown
    if ran and not teacher.calls and not teacher.unknown and student.returned(given):
        raise RuntimeError(
            "the teacher's head did not run between `attach` and the first call of the loss, and what the loss was "
            "given as its output is what the student's head returned: call `attach(student, teacher)` with the student "
            "first, and with the models that run, not with copies"
        )
    if ran and teacher.any_requires_grad and not student.any_requires_grad:
        raise RuntimeError(
            "the teacher's head returned tensors that require gradients, and the student's head none: call "
            "`attach(student, teacher)` with the student first"
        )


def _contains(rows: Tensor, row: Tensor) -> bool:
    close = torch.isclose(at_least_float32(rows), at_least_float32(row), rtol=TOLERANCE, atol=TOLERANCE)
    return bool(close.all(dim=1).any())


def _tensors(output: Any) -> Iterator[Tensor]:
    """The plain tensors of rows in what a head returned; of a `HeadOutput` the features come first."""
    if isinstance(output, tuple):
        for part in output[:1] if hasattr(output, "directions") else output:
            yield from _tensors(part)
    elif type(output) is Tensor and output.dim() > 1:
        yield output


def _no_hook() -> Callable[..., None]:
    return _ignore


def _ignore(*args: Any) -> None: ...
