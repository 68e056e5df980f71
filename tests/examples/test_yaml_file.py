"""Mistakes in YAML are told with file and line."""

from pathlib import Path

import pytest

from config.recipe import parse_overrides
from config.yaml_file import read_yaml


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"lr: 1\nepochs: 2\nlr: 3\n", r"file.yaml, line 3: no YAML \(lr is there twice\)"),
        (b"a: 1\nmsn:\n  x: 1\n  x: 1\n", r"file.yaml, line 4: no YAML \(x is there twice\)"),
        (b"a: 1\nb: [1, 2\nc: 3\n", r"file.yaml, line 3: no YAML \(expected ',' or '\]', but got ':'\)"),
        (b"a: 1\n\tb: 1\n", r"file.yaml, line 2: no YAML \(found character .* that cannot start any token\)"),
        (b"a: 1\nname: caf\xe9\n", r"file.yaml, line 2: not UTF-8 \(invalid continuation byte 0xe9\)"),
        (b"a: 1\nb: \x00\n", r"file.yaml, line 2: no YAML \(unacceptable character"),
        (
            b"a: !!python/object/apply:os.system [ls]\nb: 1\n",
            r"file.yaml, line 1: no YAML \(could not determine ",
        ),
        (b"a: &x [1]\nb: *x\n", r"file.yaml, line 2: no YAML \(the alias \*x is not read\)"),
        (b"a: &x {y: 1}\nb:\n  <<: *x\n", r"file.yaml, line 3: no YAML \(the alias \*x is not read\)"),
        (b"a: 2026-13-45\n", r"file.yaml: no YAML \(month must be in 1..12"),
        (b"[" * 5000, r"file.yaml: no YAML \("),
        (b"? [1, 2]\n: 3\n", r"file.yaml.*(no YAML|must hold `field: value` lines)"),
        (b"1: 2\n", r"file.yaml must hold `field: value` lines"),
        (b"", r"file.yaml must hold `field: value` lines"),
        (b"- 1\n", r"file.yaml must hold `field: value` lines"),
    ],
)
def test_what_is_wrong_and_where(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_yaml(tmp_path / "file.yaml")


def test_good_files_are_read_as_ever(tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text("name: ümlaut\nlr: 0.5\nscale: [0.1, 1]\nmsn: null\n", encoding="utf-8")
    assert read_yaml(tmp_path / "file.yaml") == {"name": "ümlaut", "lr": 0.5, "scale": [0.1, 1], "msn": None}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["lr"], r"`--set` \(='lr'\) must be FIELD=VALUE"),
        (["lr=[1"], r"`--set` \(='lr=\[1'\): no YAML \("),
    ],
)
def test_overrides_are_checked_alike(items: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_overrides(items)
