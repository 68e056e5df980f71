"""Tables of the documentation that are made from result files: each stands between two comments of its page."""

import re
from collections.abc import Callable

MARKER = re.compile(r"(<!-- table: (\w+) -->\n)(?:(?!<!-- ).)*(<!-- end -->)", re.DOTALL)


def filled(page: str, make: Callable[[str], str]) -> str:
    """`page` with make(NAME) between every `<!-- table: NAME -->` and the `<!-- end -->` that follows it."""
    return MARKER.sub(lambda found: f"{found[1]}\n{make(found[2])}\n\n{found[3]}", page)


def names(page: str) -> list[str]:
    """The names of the tables of `page`, in their order."""
    return [found[2] for found in MARKER.finditer(page)]
