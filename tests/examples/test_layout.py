"""The folders of examples/vit_ssl: imports between them run one way, and none of them is crowded."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
from transformers import ViTConfig, ViTModel

ROOT = Path(__file__).parents[2] / "examples" / "vit_ssl"
FILES = sorted(ROOT.rglob("*.py"))
FOLDERS = sorted(path.parent for path in FILES if path.name == "__init__.py")


def imported_modules(path: Path) -> set[str]:
    """The full names of all modules that a file imports anywhere, inside functions and for type checkers, too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports would need a package around the commands"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def node_of(path: Path) -> str:
    """The top folder of a module; a command at the root stands for itself."""
    return path.relative_to(ROOT).parts[0]


def folder_graph(paths: list[Path]) -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {node_of(path): set() for path in paths}
    for path in paths:
        used = {name.split(".")[0] for name in imported_modules(path)}
        for name in used:
            for other in (name, f"{name}.py"):
                if other in graph and other != node_of(path):
                    graph[node_of(path)].add(other)
    return graph


def test_the_graph_of_folders_has_no_cycle():
    graph = folder_graph(FILES)
    assert sum(len(others) for others in graph.values()) > len(FOLDERS)  # the parser has found something
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_a_cycle_would_be_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    for folder, text in {"one": "import two.b", "two": "def f():\n    from one import a"}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / ("a.py" if folder == "one" else "b.py")).write_text(text)
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(folder_graph(sorted(tmp_path.rglob("*.py")))).prepare()


def test_no_folder_needs_a_command():
    commands = {path.stem for path in ROOT.glob("*.py")}
    for path in FILES:
        if path.parent != ROOT:
            assert not commands & imported_modules(path), path


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_folder_says_what_it_holds_and_holds_a_dozen(folder):
    (docstring,) = ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body
    assert ast.literal_eval(docstring.value).endswith(".")
    siblings = [path for path in folder.iterdir() if path.name not in ("__init__.py", "__pycache__")]
    assert len(siblings) <= 13


def test_files_are_short():
    lengths = [len(path.read_text(encoding="utf-8").splitlines()) for path in FILES if path.name != "__init__.py"]
    assert median(lengths) <= 150
    assert max(lengths) <= 250


def test_an_auto_model_is_evaluated_without_the_pretraining_methods(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    ViTModel(ViTConfig(**sizes), add_pooling_layer=False).save_pretrained(tmp_path / "model")
    script = """
import sys
from pathlib import Path
import evaluate
from evaluators.request import Request
model, output = sys.argv[1:]
evaluate.evaluate(Request(model, dataset="digits", output=Path(output)), "knn")
print(sorted(name for name in sys.modules if name.startswith(("methods.", "training."))))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "model"), str(tmp_path / "results")]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    loaded = ast.literal_eval(found.stdout.splitlines()[-1])
    assert "training.checkpoint_file" in loaded  # the names are those of our modules
    assert not {"methods.registry", "methods.method", "training.run"} & set(loaded)
