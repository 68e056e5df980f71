"""YAML whose mistakes are told with file and line, in which no key stands twice and nothing stands for another."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml


class _UniqueKeys(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Return the next node, as SafeLoader does, unless it stands for another one: so can a page hold gigabytes."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, f"the alias *{event.anchor} is not read", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return the mapping of a node, as SafeLoader does, after a look for keys that stand there twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a file.

    Raises:
        ValueError: the file is not UTF-8, not YAML, has a key twice, or holds something else than `field: value` lines;
            the message names file and line.
    """
    content = path.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason} {content[error.start]:#x})") from error
    settings = parse_yaml(text, str(path))
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise ValueError(f"{path} must hold `field: value` lines")
    return settings


def parse_yaml(text: str, source: str) -> Any:
    """Return the value of some YAML; raise ValueError, beginning with `source` and the line, for a mistake in it."""
    try:
        return yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = text[: error.position].count("\n") if isinstance(error, yaml.reader.ReaderError) else None
        line = mark.line if mark is not None else line
        where = source if line is None or "\n" not in text else f"{source}, line {line + 1}"
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{where}: no YAML ({problem})") from error
    except (ValueError, RecursionError) as error:  # a date that is none, or a thousand brackets
        raise ValueError(f"{source}: no YAML ({error})") from error
