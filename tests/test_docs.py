"""The documentation site: it builds without a warning, needs no network, and its reference is complete."""

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from docs import mathml
from mkdocs.exceptions import PluginError

import vmf_heads.compat.dino
import vmf_heads.mixture

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_site_builds_strictly_and_needs_no_network(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert {"index.html", "method.html", "api.html"} <= {page.name for page in pages}
    for name in ("index.html", "method.html", "loss.html", "numerics.html"):
        html = (tmp_path / name).read_text()
        assert '<div class="math"' in html, name
        assert not re.search(r"<code[^>]*>[^<]*\\(log|kappa|frac)|\$\\", html), name  # a formula that stayed TeX
    for page in pages:
        html = page.read_text()
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]* src="?(https?:[^" >]+)', html)
        loaded += re.findall(r'<link[^>]* rel="?(?:stylesheet|preconnect|preload)"?[^>]* href="?(https?:[^" >]+)', html)
        loaded += re.findall(r'<link[^>]* href="?(https?:[^" >]+)[^>]* rel="?(?:stylesheet|preconnect|preload)', html)
        assert not loaded, page


def test_formulas_become_mathml() -> None:
    element = mathml.mathml(r"\log C_p(\lVert w_k \rVert / \tau)")
    assert element.startswith("<math ")
    text = "".join(ElementTree.fromstring(element).itertext())
    assert text == "logCp(‖wk‖/τ)"


@pytest.mark.parametrize(
    ("tex", "message"), [(r"\kapa", r"command that is not understood: \\kapa"), ("x_", "not understood")]
)
def test_a_formula_with_an_error_stops_the_build(tex: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        mathml.mathml(tex)


def test_the_reference_has_every_public_name() -> None:
    listed = set(re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE))
    public = {f"vmf_heads.{name}" for name in vmf_heads.__all__}
    public |= {f"vmf_heads.mixture.{name}" for name in vmf_heads.mixture.__all__}
    # DINOHead is VMFPrototypeHead and stands on the page as a sentence.
    for found in pkgutil.iter_modules(vmf_heads.compat.__path__):
        if found.name.startswith("_"):
            continue
        module = importlib.import_module(f"vmf_heads.compat.{found.name}")
        public |= {f"{module.__name__}.{name}" for name in module.__all__}
    assert public - {"vmf_heads.compat.dino.DINOHead", "vmf_heads.compat.esvit.DINOHead"} <= listed
    assert "`vmf_heads.compat.dino.DINOHead` is `VMFPrototypeHead`" in (ROOT / "docs/api.md").read_text()
    assert vmf_heads.compat.dino.DINOHead is vmf_heads.VMFPrototypeHead


def test_the_readme_table_has_every_public_name() -> None:
    table = (ROOT / "README.md").read_text().split("## What is in the box")[1].split("\n## ")[0]
    assert set(vmf_heads.__all__) <= set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))


def test_every_test_that_the_page_of_promises_names_exists() -> None:
    """In the last column of its tables: `test_FILE.py`, and then `NAME` or the beginning of one, `NAME_…`."""
    tests: dict[str, str] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        tests[path.name] = tests.get(path.name, "") + path.read_text()  # some are there twice, in tests/examples, too
    file, named, header = "", 0, ""
    for line in (ROOT / "docs/reliability.md").read_text().splitlines():
        cells = line.split("|")
        header = cells[-2] if line.startswith("|") and not header else header if line.startswith("|") else ""
        for span in re.findall(r"`([^`]+)`", cells[-2] if header.startswith(" test") else line):
            if re.fullmatch(r"(tests/)?test_\w+\.py", span):
                file = span.removeprefix("tests/")
                assert file in tests, line
            elif header.startswith(" test"):
                named += 1
                name = span.replace("_…", r"_\w+")
                assert re.search(rf"^def test_{name}\(", tests[file], re.MULTILINE), f"{file}: {span}"
    assert named > 70
