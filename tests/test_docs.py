"""The documentation site: it builds without a warning, needs no network, and its reference is complete."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vmf_heads
import vmf_heads.compat.dino

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_site_builds_strictly_and_needs_no_network(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert {"index.html", "method.html", "api.html"} <= {page.name for page in pages}
    for page in pages:
        html = page.read_text()
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]* src="?(https?:[^" >]+)', html)
        loaded += re.findall(r'<link[^>]* rel="?(?:stylesheet|preconnect|preload)"?[^>]* href="?(https?:[^" >]+)', html)
        loaded += re.findall(r'<link[^>]* href="?(https?:[^" >]+)[^>]* rel="?(?:stylesheet|preconnect|preload)', html)
        assert not loaded, page


def test_the_reference_has_every_public_name() -> None:
    listed = set(re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE))
    public = {f"vmf_heads.{name}" for name in vmf_heads.__all__}
    # DINOHead is VMFPrototypeHead and stands on the page as a sentence.
    for path in sorted((ROOT / "src/vmf_heads/compat").glob("[a-z]*.py")):
        module = importlib.import_module(f"vmf_heads.compat.{path.stem}")
        public |= {f"{module.__name__}.{name}" for name in module.__all__}
    assert public - {"vmf_heads.compat.dino.DINOHead"} <= listed
    assert "`vmf_heads.compat.dino.DINOHead` is `VMFPrototypeHead`" in (ROOT / "docs/api.md").read_text()
    assert vmf_heads.compat.dino.DINOHead is vmf_heads.VMFPrototypeHead


def test_the_readme_table_has_every_public_name() -> None:
    table = (ROOT / "README.md").read_text().split("## What is in the box")[1].split("\n## ")[0]
    assert set(vmf_heads.__all__) <= set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))
