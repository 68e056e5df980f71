"""What a head costs a rank: bytes sent in a step, held after it, and at its fullest moment.

The ranks have images of their own. Prototypes, moments, features and what is sent are float32; collectives send what a
ring sends, which no algorithm can undercut for large messages: of n ranks, each sends (n - 1) / n of what it gathers or
scatters in the end, and twice that where all get a sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

FLOAT = 4  # bytes
REPLICATED, GATHERED = 0, -1  # in the place of a number of shards
STATE = 5  # (K, p + 1) tensors after a step: student, its gradient, two moments of AdamW, teacher


@dataclass(frozen=True)
class Setting:
    """A head and what a rank shows it in a step.

    Attributes:
        prototypes: K.
        dim: p.
        ranks: that train together.
        student_rows: of one rank: crops * images.
        teacher_rows: of one rank: global crops * images.
        chunk_bytes: that the fused loss takes for logits, see vmf_heads._memory.
    """

    prototypes: int
    dim: int
    ranks: int
    student_rows: int
    teacher_rows: int
    chunk_bytes: int = 32 * 2**20

    def parameters(self, parts: int = 1) -> int:
        """Bytes of directions and norms, of a part of the prototypes."""
        return FLOAT * math.ceil(self.prototypes / parts) * (self.dim + 1)


class Cost(NamedTuple):
    """Bytes of one rank: sent in a step, held after it, and at the fullest moment from its forward to its backward."""

    sent: float
    held: float
    peak: float


def replicated(setting: Setting) -> Cost:
    """Every rank has the whole head; DistributedDataParallel averages its gradients."""
    whole = setting.parameters()
    sent = all_reduce(whole, setting.ranks) + center(setting)
    held = STATE * whole
    # The loss makes the gradient of the directions; DistributedDataParallel keeps another, its bucket.
    return Cost(sent, held, held + whole + rows(setting, 1))


def gathered(setting: Setting) -> Cost:
    """FSDP2: every rank has a part of the head, and all ranks gather it for the loss."""
    whole, part = setting.parameters(), setting.parameters(setting.ranks)
    sent = (2 + 1) * (setting.ranks - 1) * part + center(setting)  # both heads are gathered, a gradient is scattered
    held = STATE * part
    # In the loss the prototypes of student and teacher and the gradient are whole. While the gradient is scattered, the
    # student's prototypes, the gradient and its copy are, and buffers of FSDP2 take four parts more (as measured).
    return Cost(sent, held, held - part + 3 * whole + max(4 * part, rows(setting, 1)))


def sharded(setting: Setting, shards: int) -> Cost:
    """shard_prototypes: a rank has one of `shards` parts, which ranks / shards ranks have alike."""
    part, copies = setting.parameters(shards), setting.ranks // shards
    own_rows = setting.student_rows, setting.teacher_rows
    student, teacher = (FLOAT * count for count in own_rows)
    # Features and weights of the student; features, weights and summed student features of the teacher.
    gather = (shards - 1) * ((setting.dim + 1) * student + (2 * setting.dim + 1) * teacher)
    # Gradients of the student's features; T W and T b.
    scatter = (shards - 1) * (setting.dim * student + (setting.dim + 1) * teacher)
    # A maximum and a sum of one number a row; of two for the teacher, whose statistics are another softmax.
    normalise = 2 * all_reduce(shards * (student + 2 * teacher), shards)
    sent = gather + scatter + normalise + all_reduce(part, copies) + center(setting)
    held = STATE * part
    # The gradient that the loss makes is the one that stays. Where there are copies, it is averaged in another tensor,
    # after the loss has freed what it held.
    return Cost(sent, held, held + max(part if copies > 1 else 0, rows(setting, shards)))


def rows(setting: Setting, shards: int) -> float:
    """What the loss holds besides prototypes and their gradients: logits of one chunk, and (rows, p) tensors."""
    part = math.ceil(setting.prototypes / shards)
    student, teacher = shards * setting.student_rows, shards * setting.teacher_rows
    chunk = min(setting.chunk_bytes, FLOAT * part * max(student, (2 if shards == 1 else 3) * teacher))
    # Features, their gradients, the same divided by the temperature; of the teacher features, T W, summed features.
    return chunk + FLOAT * setting.dim * (3 * student + 3 * teacher)


def center(setting: Setting) -> float:
    """Of the centre: K sums of probabilities, in float64, and the number of rows."""
    return all_reduce(8 * (setting.prototypes + 1), setting.ranks)


def all_reduce(size: float, ranks: int) -> float:
    """What one of these ranks sends until all have the sum of `size` bytes."""
    return 2 * (ranks - 1) / ranks * size


def best_shards(setting: Setting) -> int:
    """The number of shards, a power of two, for which the least is sent."""
    powers = [2**i for i in range(setting.ranks.bit_length()) if setting.ranks % 2**i == 0]
    return min(powers, key=lambda shards: sharded(setting, shards).sent)


def cost(setting: Setting, shards: int) -> Cost:
    """That of REPLICATED, of GATHERED, or of so many shards."""
    if shards == REPLICATED:
        return replicated(setting)
    return gathered(setting) if shards == GATHERED else sharded(setting, shards)
