"""What a field of a recipe means: the comment beside it in its class, which is written nowhere else."""

from __future__ import annotations

import ast
import difflib
import inspect
import io
import textwrap
import tokenize
from pathlib import Path
from typing import Any, NamedTuple

from config.methods import IBOTSettings, MSNSettings
from config.prototypes import OnlineEMSettings
from config.recipe import RECIPES, Recipe, load_recipe
from config.settings import flat


class Field(NamedTuple):
    """A field as its class has it."""

    kind: str  # its annotation
    meaning: str  # the comment beside it
    group: str  # the comment above the lines that it stands in


def fields() -> dict[str, Field]:
    """Return every field of a recipe; those of a section are called `ibot.mask_ratio`, `msn.patch_drop`, ...."""
    found = _fields_of(Recipe)
    sections = {"ibot": IBOTSettings, "msn": MSNSettings, "online_em": OnlineEMSettings}
    for section, settings in sections.items():
        found |= {f"{section}.{name}": field for name, field in _fields_of(settings).items()}
    return found


def explain(name: str, recipe: str | Path | None = None) -> str:
    """Return what a field means, and its value in a recipe; without one, the values in all recipes there are.

    Raises ValueError for a name that is no field, FileNotFoundError for a recipe that does not exist.
    """
    known = fields()
    if name not in known:
        similar = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
        similar += [field for field in known if field.rpartition(".")[2] == name]
        allowed = ", ".join(dict.fromkeys(similar or known))
        raise ValueError(f"`explain` (={name!r}) must be a field of a recipe: {allowed}{', ...' if similar else ''}")
    field = known[name]
    lines = [f"{name}: {field.kind}", field.meaning or "it has no comment in config/"]
    lines += [f"Group: {field.group}"] if field.group else []
    if recipe is not None:
        return "\n  ".join([*lines, f"In {recipe}: {_value(load_recipe(recipe), name)}"])
    recipes: dict[str, list[str]] = {}
    for path in sorted(RECIPES.glob("*.yaml")):
        recipes.setdefault(_value(load_recipe(path), name), []).append(path.stem)
    return "\n  ".join([*lines, *(f"{value} in {', '.join(names)}" for value, names in recipes.items())])


def _value(recipe: Recipe, name: str) -> str:
    values: dict[str, Any] = flat(recipe)
    if name in values:
        return str(values[name])
    inside = [f"{field}={value}" for field, value in values.items() if field.startswith(f"{name}.")]
    return ", ".join(inside) or "no such field, its section being null"


def _fields_of(settings: type[Any]) -> dict[str, Field]:
    source = textwrap.dedent(inspect.getsource(settings))
    (definition,) = ast.parse(source).body
    lines = source.splitlines()
    beside, above = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = lines[token.start[0] - 1].lstrip().startswith("#")
            (above if alone else beside)[token.start[0]] = token.string.removeprefix("#").strip()
    found, group, last = {}, "", 0
    for node in getattr(definition, "body", []):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            group = " ".join(above[line] for line in above if last < line < node.lineno) or group
            last = node.lineno
            found[node.target.id] = Field(ast.unparse(node.annotation), beside.get(node.lineno, ""), group)
    return found
