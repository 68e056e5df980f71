"""The files that a forge reads say what pyproject.toml says."""

import re
from pathlib import Path

import yaml

import vmf_heads

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
CONSTRAINTS = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split("."))


def floor_of(pattern: str) -> tuple[int, ...]:
    found = re.search(pattern + r">=([\d.]+)\"", PYPROJECT)
    assert found, pattern
    return version(found[1])


def workflow() -> dict:
    return yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())


def test_the_workflow_runs_the_oldest_and_the_newest_versions():
    matrix = workflow()["jobs"]["library"]["strategy"]["matrix"]
    pythons, torches = [version(text) for text in matrix["python"]], [version(text) for text in matrix["torch"]]
    assert pythons == sorted(pythons)
    assert torches == sorted(torches)
    assert pythons[0] == floor_of('requires-python = "')
    assert torches[0][:2] == floor_of('"torch')
    assert torches[-1] >= version(CONSTRAINTS["torch"])
    classified = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
    assert {version(text) for text in classified} <= set(pythons)
    assert all(set(pair) <= {"python", "torch"} for pair in matrix["exclude"])


def test_every_job_of_the_workflow_runs_something_and_ends():
    jobs = workflow()["jobs"]
    assert set(jobs) == {"library", "lint", "docs", "everything"}
    for name, job in jobs.items():
        assert job["timeout-minutes"] <= 90, name
        commands = [step["run"] for step in job["steps"] if "run" in step]
        assert commands, name
        targets = re.findall(r"make (\S+)", " ".join(commands))
        for target in targets:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), (name, target)


def test_the_list_of_library_tests_names_what_exists():
    """An argument that names nothing would silently leave nothing out."""
    for line in (ROOT / "tests/library.txt").read_text().splitlines():
        option, _, pattern = line.rpartition("=")
        assert option in ("", "--ignore", "--ignore-glob"), line
        assert list(ROOT.glob(pattern)), line


def test_the_citation_names_this_version_and_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == vmf_heads.__version__
    assert f'\nlicense = "{citation["license"]}"\n' in PYPROJECT
    (paper,) = citation["references"]
    readme = (ROOT / "README.md").read_text()
    assert paper["url"] in readme
    assert all(author["family-names"].lower().replace("é", "{\\'e}") in readme.lower() for author in paper["authors"])


def test_pre_commit_runs_the_tools_of_make_lint():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    makefile = (ROOT / "Makefile").read_text()
    for hook in local["hooks"]:
        command = re.match(r"\.venv/bin/(\w+(?: check| format)?)", hook["entry"])
        assert command, hook
        assert f"$(BIN)/{command[1]}" in makefile, hook
    assert {hook["id"] for hook in local["hooks"]} == {"ruff", "ruff-format", "mypy"}
