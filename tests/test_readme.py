"""README and documentation: their Python runs and prints what they say, the commands and files they name exist."""

import contextlib
import io
import re
from pathlib import Path

import pytest
from benchmarks import matrix, results

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
RECIPES = ROOT / "examples/vit_ssl/recipes"


def code_blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line before the code, code) of each block of `language`."""
    text = page.read_text()
    fences = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, fence.start(2)), fence[2]) for fence in fences if fence[1] == language]


def promised_output(code: str) -> list[str]:
    """What the comments say that `print` shows: behind it, or in comment lines that follow it."""
    lines = re.findall(r"^(?: *print\(.*\)  # (.+)|# (.+))$", code, re.MULTILINE)
    return [behind or below for behind, below in lines]


@pytest.mark.parametrize("page", [page for page in PAGES if code_blocks(page, "python")], ids=lambda page: page.name)
def test_python_runs_and_prints_what_it_says(page: Path) -> None:
    namespace: dict[str, object] = {}
    for line, code in code_blocks(page, "python"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + code, page, "exec"), namespace)  # a traceback names the page's own line
        assert printed.getvalue().splitlines() == promised_output(code)


def test_the_first_screen_of_the_readme() -> None:
    """What it is, one formula, one figure, one number with its command, the installation and the lines to change."""
    lines = (ROOT / "README.md").read_text().splitlines()[:40]
    assert {"```math", "```diff"} <= set(lines)
    assert "+    dino_loss.attach(student, teacher)  # once both are built and wrapped" in lines
    screen = "\n".join(lines)
    for part in ("![", "python -m benchmarks loss", "pip install ."):
        assert part in screen, part


def test_the_readme_shows_the_result_of_the_demo() -> None:
    block = re.search(r"<!-- demo-table -->\n(.*?)<!-- /demo-table -->", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block
    for row in ("pixels", "random", "DINO", "DINO-vMF"):
        assert re.search(rf"^\|[^|]*{row}[^|]*\|.*(\d\d\.\d ± \d\.\d \| ?){{4}}", block[1], re.MULTILINE), row


def test_the_matrix_shows_the_outcomes_of_the_tests_and_counts_the_lines_of_the_diffs() -> None:
    page = (ROOT / "README.md").read_text()
    assert matrix.rendered(page) == page
    rows = results.latest("matrix")["rows"]
    assert len(rows) == len(matrix.CODE_BASES) > 9
    assert all(passed == of for row in rows for passed, of in (row["original"], row["fused"], row["fsdp2"]))


def test_every_test_behind_the_matrix_exists() -> None:
    files = sorted({test.split("::")[0] for base in matrix.CODE_BASES for test in matrix.tests(base)})
    names = {
        f"{file}::{name}"
        for file in files
        for name in re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), re.MULTILINE)
    }
    for base in matrix.CODE_BASES:
        for test in matrix.tests(base):
            assert any(name.startswith(test.split("[")[0]) for name in names), test


@pytest.mark.parametrize(
    ("passed", "of", "word"), [(0, 0, "not tried"), (2, 2, "yes"), (0, 2, "fails"), (1, 2, "1 of 2 tests")]
)
def test_a_cell_of_the_matrix_says_what_its_tests_did(passed: int, of: int, word: str) -> None:
    assert matrix.word(passed, of, none="not tried") == word


def commands(page: Path) -> dict[str, set[str]]:
    """What the page tells a reader to type: targets of make, scripts, recipes."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    code = "\n".join([block for _, block in code_blocks(page, "")] + re.findall(r"`([^`\n]+)`", prose))
    patterns = {"make": r"\bmake ([a-z-]+)", "script": r"\bpython ([\w/]+\.py)", "recipe": r"--recipe ([a-z]\w*)"}
    return {kind: set(re.findall(pattern, code)) for kind, pattern in patterns.items()}


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(page).values())], ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    found = commands(page)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert found["make"] <= targets
    assert all((ROOT / script).is_file() for script in found["script"]), found["script"]
    assert all((RECIPES / f"{recipe}.yaml").is_file() for recipe in found["recipe"]), found["recipe"]


def test_commands_and_links_are_found() -> None:
    assert {"demo", "test"} <= commands(ROOT / "README.md")["make"]
    for kind in ("script", "recipe"):
        assert set().union(*(commands(page)[kind] for page in PAGES)), kind
    assert links_to_files(ROOT / "README.md")


def test_every_recipe_is_in_the_docs() -> None:
    section = (ROOT / "docs/examples.md").read_text().split("## Recipes")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in RECIPES.glob("*.yaml"))


def links_to_files(page: Path) -> list[str]:
    """Targets of the page's links, without those to the web and within the page."""
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    return [target.split("#")[0] for target in targets if not target.startswith(("http", "#"))]


@pytest.mark.parametrize("page", [page for page in PAGES if links_to_files(page)], ids=lambda page: page.name)
def test_links_to_files(page: Path) -> None:
    for target in links_to_files(page):
        assert (page.parent / target).exists(), target
