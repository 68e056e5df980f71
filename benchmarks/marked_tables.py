"""Tables of the documentation that are made from result files: each stands between two comments of its page."""

import re
from collections.abc import Callable

MARKER = r"(<!-- table: {group}(\w+) -->\n)(?:(?!<!-- ).)*(<!-- end -->)"


def filled(page: str, make: Callable[[str], str], *, group: str = "") -> str:
    """`page` with make(NAME) between every `<!-- table: NAME -->` and the `<!-- end -->` that follows it.

    With a `group`, only of the tables of that group, whose markers are `<!-- table: GROUP NAME -->`.
    """
    return _marker(group).sub(lambda found: f"{found[1]}\n{make(found[2])}\n\n{found[3]}", page)


def names(page: str, *, group: str = "") -> list[str]:
    """The names of the tables of `page` in `group`, in their order."""
    return [found[2] for found in _marker(group).finditer(page)]


def _marker(group: str) -> re.Pattern[str]:
    return re.compile(MARKER.format(group=re.escape(f"{group} ") if group else ""), re.DOTALL)
