"""Tables of the documentation that are made from result files: each stands between two comments of its page."""

import re
from collections.abc import Callable

MARKER = re.compile(r"(<!-- table: (\w+) -->\n)(?:(?!<!-- ).)*(<!-- end -->)", re.DOTALL)


def filled(page: str, make: Callable[[str], str | None]) -> str:
    """`page` with make(NAME) between every `<!-- table: NAME -->` and the `<!-- end -->` that follows it.

    Where make gives None, because it is another command's table, it stays as it is.
    """

    def replaced(found: re.Match[str]) -> str:
        made = make(found[2])
        return found[0] if made is None else f"{found[1]}\n{made}\n\n{found[3]}"

    return MARKER.sub(replaced, page)


def names(page: str) -> list[str]:
    """The names of the tables of `page`, in their order."""
    return [found[2] for found in MARKER.finditer(page)]
