"""Which student rows and teacher rows can be worked on together, because no pair leads out of their group."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._logits import chunks_of

LEAST_DIM = 128
"""With fewer dimensions, the two products that are saved take less than the small ones and passes that come instead."""
MOST_ROWS = 512
"""With more rows in a chunk, what is in a cache at a time are few prototypes, and the small products are many."""


class _Component(NamedTuple):
    """Rows that pairs connect, as the crops of one image."""

    students: list[int]
    teachers: list[int]


@dataclass(frozen=True)
class StudentChunk:
    """Student rows that are in memory at a time.

    Attributes:
        rows: (ns,) int64, their numbers.
        groups: slices of `rows`, each beside one of the rows of the `TeacherChunk`, in which all its teacher rows are.
            In a chunk of DINO's crops they are the crops of some images.
        pairs: three (n,) int64: the student row of a pair as a place in `rows`, its teacher row as one in those of the
            `TeacherChunk`, and its place in the flat `teacher_rows`.
    """

    rows: Tensor
    groups: tuple[tuple[slice, slice], ...]
    pairs: tuple[Tensor, Tensor, Tensor]

    def weights_of_pairs(self, weights: Tensor, teachers: int) -> Tensor:
        """(ns, teachers), from weights in the shape of `teacher_rows`: the sum of those that a pair has there."""
        student, teacher, place = self.pairs
        result = weights.new_zeros(len(self.rows), teachers)
        return result.index_put_((student, teacher), weights.flatten()[place], accumulate=True)


@dataclass(frozen=True)
class TeacherChunk:
    """Teacher rows that are in memory at a time: (nt,) int64; and all student rows that are trained towards them."""

    rows: Tensor
    students: tuple[StudentChunk, ...]

    @property
    def rows_of_memory(self) -> int:
        """How many rows of logits are needed: these, and beside them student rows in turn, or those of statistics."""
        return len(self.rows) + max([len(self.rows), *(len(chunk.rows) for chunk in self.students)])


def row_groups(teacher_rows: Tensor, teachers: int, *, most_rows: int, dim: int) -> tuple[TeacherChunk, ...] | None:
    """Chunks of at most `most_rows` rows, a quarter of them the teacher's, in which are all pairs of `teacher_rows`.

    They have at most `MOST_ROWS` rows, too. A student row without a teacher row is in none of them, a teacher row
    without a student row is in one. None where rows that hang together are too many, or where working on them together
    costs more than it saves.

    Raises IndexError where a number is that of no teacher row.
    """
    numbers = teacher_rows.numpy()
    if numbers.size and (largest := numbers.max()) >= teachers:
        raise IndexError(
            f"`teacher_rows` (with {largest}) must be less than the rows in `teacher.features` (={teachers})"
        )
    if dim < LEAST_DIM:
        return None
    return _chunks_of_pairs(numbers.tobytes(), teacher_rows.shape[1], teachers, min(most_rows, MOST_ROWS), dim)


@lru_cache(maxsize=16)  # a training step has the pairs of the last one
def _chunks_of_pairs(
    content: bytes, width: int, teachers: int, most_rows: int, dim: int
) -> tuple[TeacherChunk, ...] | None:
    flat = array("q", content).tolist()
    components, most_teachers = _components(flat, width, teachers), most_rows // 4
    most_students = most_rows - most_teachers
    # Per group ns * nt numbers of two products with K columns, which replace two products of nt rows with dim columns.
    if any(len(c.students) > min(most_students, dim) or len(c.teachers) > most_teachers for c in components):
        return None
    return tuple(
        _teacher_chunk(flat, width, part, most_students, dim)
        for part in _cut(components, lambda component: len(component.teachers), most_teachers)
    )


def _components(flat: list[int], width: int, teachers: int) -> list[_Component]:
    """What hangs together, by the first teacher row."""
    parent = list(range(teachers))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    first: dict[int, int] = {}  # of the teacher rows of a student row
    for place, teacher in enumerate(flat):
        if teacher >= 0:
            a, b = root(teacher), root(first.setdefault(place // width, teacher))
            parent[max(a, b)] = min(a, b)
    components: dict[int, _Component] = {}
    for teacher in range(teachers):
        components.setdefault(root(teacher), _Component([], [])).teachers.append(teacher)
    for student, teacher in first.items():
        components[root(teacher)].students.append(student)
    return list(components.values())


def _cut(components: Sequence[_Component], size: Callable[[_Component], int], most: int) -> list[list[_Component]]:
    """The components in order, in parts with about equally many rows: at most `most`, or a single component."""
    lengths = chunks_of(sum(map(size, components)), most)
    parts: list[list[_Component]] = []
    room = 0
    for component in components:
        if not parts or size(component) > room:
            parts.append([])
            room = max(lengths[0].stop, size(component))
        parts[-1].append(component)
        room -= size(component)
    return parts


def _teacher_chunk(
    flat: list[int], width: int, components: list[_Component], most_students: int, dim: int
) -> TeacherChunk:
    rows = [row for component in components for row in component.teachers]
    place_of = {row: place for place, row in enumerate(rows)}
    trained = [component for component in components if component.students]
    students = []
    for part in _cut(trained, lambda component: len(component.students), most_students):
        groups: list[tuple[slice, slice]] = []
        numbers: list[int] = []
        for group in _cut(part, lambda component: len(component.students), max(dim // 2, 1)):
            start = len(numbers)
            numbers += [row for component in group for row in component.students]
            others = slice(place_of[group[0].teachers[0]], place_of[group[-1].teachers[-1]] + 1)
            groups.append((slice(start, len(numbers)), others))
        pairs = [
            (place, place_of[flat[pair]], pair)
            for place, row in enumerate(numbers)
            for pair in range(row * width, (row + 1) * width)
            if flat[pair] >= 0
        ]
        student, teacher, place = map(_int64, zip(*pairs, strict=True))
        students.append(StudentChunk(_int64(numbers), tuple(groups), (student, teacher, place)))
    return TeacherChunk(_int64(rows), tuple(students))


def _int64(numbers: Sequence[int]) -> Tensor:
    """A tensor on the CPU, which torch.tensor would make on the default device: it is kept for later calls."""
    return torch.from_numpy(np.array(numbers, dtype=np.int64))
