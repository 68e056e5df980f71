"""Damage to the bytes of a file, drawn at random."""

import random
import re

NUMBERS = (b"-1", b"0", b"1e400", b".nan", b"99999999999999999999", b"3.5", b"null", b"''")


def damaged(content: bytes, foreign: list[bytes], rng: random.Random) -> tuple[str, bytes]:
    """Return (the kind of damage, the damaged content); `foreign` are the contents of other files."""
    kind, damage = rng.choice(DAMAGES)
    return kind, damage(content, foreign, rng)


def _flipped(content: bytes, _: list[bytes], rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut_off(content: bytes, _: list[bytes], rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _block(content: bytes, rng: random.Random) -> tuple[int, int]:
    begin = rng.randrange(len(content))
    return begin, min(len(content), begin + rng.choice((1, 4, 16, 64, 512, 4096)))


def _zeroed(content: bytes, _: list[bytes], rng: random.Random) -> bytes:
    begin, end = _block(content, rng)
    return content[:begin] + bytes(end - begin) + content[end:]


def _swapped(content: bytes, _: list[bytes], rng: random.Random) -> bytes:
    begin, end = _block(content, rng)
    rest = content[:begin] + content[end:]
    place = rng.randrange(len(rest) + 1)
    return rest[:place] + content[begin:end] + rest[place:]


def _repeated(content: bytes, _: list[bytes], rng: random.Random) -> bytes:
    begin, end = _block(content, rng)
    return content[:end] + content[begin:end] * rng.choice((1, 2, 50)) + content[end:]


def _removed(content: bytes, _: list[bytes], rng: random.Random) -> bytes:
    begin, end = _block(content, rng)
    return content[:begin] + content[end:]


def _inserted(content: bytes, _: list[bytes], rng: random.Random) -> bytes:
    begin, end = _block(content, rng)
    return content[:begin] + rng.randbytes(end - begin) + content[begin:]


def _foreign(content: bytes, foreign: list[bytes], rng: random.Random) -> bytes:
    other = rng.choice(foreign)
    begin = rng.choice((0, 0, rng.randrange(len(content))))
    return content[:begin] + other[rng.choice((0, 0, rng.randrange(len(other)))) :]


def _other_number(content: bytes, _: list[bytes], rng: random.Random) -> bytes:
    numbers = list(re.finditer(rb"\d+", content))
    if not numbers:
        return content[::-1]
    number = rng.choice(numbers)
    return content[: number.start()] + rng.choice(NUMBERS) + content[number.end() :]


DAMAGES = (
    ("bits flipped", _flipped),
    ("bits flipped", _flipped),
    ("cut off", _cut_off),
    ("zeros", _zeroed),
    ("block moved", _swapped),
    ("block repeated", _repeated),
    ("block removed", _removed),
    ("noise inserted", _inserted),
    ("foreign content", _foreign),
    ("another number", _other_number),
)
