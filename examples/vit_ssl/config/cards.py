"""The recipes there are, from the card at the top of each file: what it is for, what it takes, how long it runs."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

from config.recipe import RECIPES, load_recipe

METHODS = {"dino": "DINO", "ibot": "iBOT", "msn": "MSN"}
DATA = {"folder": "a folder of images (--data)", "hub": "a set of the hub (--data)", "stream": "a stream (--data)"}


class Card(NamedTuple):
    """The comment that a recipe begins with."""

    purpose: str  # its first sentences
    entries: dict[str, str]  # "Paper", "Command", "Hardware" and "Expect", without line breaks


def read_card(path: Path) -> Card:
    """Return the card of a recipe file; its entries begin with a word and a colon, and go on in indented lines."""
    header = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        header.append(line.removeprefix("#"))
    purpose, entries, entry = [], {}, ""
    for line in header:
        if begins := re.match(r" ([A-Z][a-z]+): +(\S.*)", line):
            entry = begins[1]
            entries[entry] = begins[2]
        elif entry:
            entries[entry] += " " + line.strip()
        elif line.strip():
            purpose.append(line.strip())
    return Card(" ".join(purpose), {name: text.strip() for name, text in entries.items()})


def recipe_list() -> str:
    """Return every file in recipes/: its name, method and data, what it is for, and the time it takes."""
    parts = []
    for path in sorted(RECIPES.glob("*.yaml")):
        recipe, card = load_recipe(path), read_card(path)
        method = METHODS[recipe.method] + ("-vMF" if recipe.normalization == "vmf" else "")
        time = re.split(r"[;.](?: |$)", card.entries.get("Hardware", ""))[0]
        about = [f"{method} on {DATA.get(recipe.dataset, recipe.dataset)}, {recipe.image_size} px", card.purpose]
        about += [f"Time: {time}"] if time else []
        wrapped = [textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="    ") for text in about]
        parts.append("\n".join([recipe.name, *wrapped]))
    hint = "With --data a recipe takes your images in place of its own; --explain FIELD tells what a setting means."
    return "\n".join([*parts, "", hint])
