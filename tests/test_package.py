"""The package itself: what it exports, what imports what, and what a user gets who installs the wheel."""

import ast
import inspect
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import vmf_heads
from vmf_heads.compat import dino

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/vmf_heads"

# Changing a line here changes the public contract: say so in CHANGELOG.md.
SIGNATURES = """
HeadOutput(features, directions, scales)
ProbabilityCentering(num_prototypes, momentum=0.9, *, center_on='responsibilities', start='zeros', process_group=None)
TeacherTargets(num_prototypes, student_temp=0.1, center_momentum=0.9, *, centering='probability', \
center_on='responsibilities', center_start='zeros', center_shape=None, layer='last_layer', fused=False, \
process_group=None)
VMFPrototypeHead(in_dim, out_dim=65536, use_bn=False, norm_last_layer=False, nlayers=3, hidden_dim=2048, \
bottleneck_dim=256, *, mlp_bias=True, temperature=0.1, normalizer='vmf', output='logits', float32_scores=False)
log_vmf_normalizer(kappa, p, *, relative=False, compiled=None)
prototype_cross_entropy(student, teacher, *, student_temperature, teacher_temperature, normalizer='vmf', \
log_center=None, teacher_rows=None, weights=None, center_on='responsibilities', batch_chunk_size=None)
prototype_report(prototypes, features=None, *, scores=None, temperature=None, log_normalizer=None, log_center=None, \
thresholds=(0.9,), void_threshold=0.9)
set_temperature(module, temperature)
vmf_mean_resultant(kappa, p, *, compiled=None)
"""
DINO_SIGNATURES = """
DINOHead(in_dim, out_dim=65536, use_bn=False, norm_last_layer=False, nlayers=3, hidden_dim=2048, \
bottleneck_dim=256, *, mlp_bias=True, temperature=0.1, normalizer='vmf', output='logits', float32_scores=False)
DINOLoss(out_dim, ncrops, warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs, student_temp=0.1, \
center_momentum=0.9, *, centering='probability', center_on='responsibilities', center_start='zeros', fused=False, \
process_group=None)
"""


def signature(module, name: str) -> str:
    found = inspect.signature(getattr(module, name))
    bare = [parameter.replace(annotation=parameter.empty) for parameter in found.parameters.values()]
    return name + str(found.replace(parameters=bare, return_annotation=found.empty))


@pytest.mark.parametrize(("module", "want"), [(vmf_heads, SIGNATURES), (dino, DINO_SIGNATURES)])
def test_public_names_and_signatures(module, want):
    assert [signature(module, name) for name in module.__all__] == want.strip().splitlines()


def test_version():
    assert f'\nversion = "{vmf_heads.__version__}"\n' in (ROOT / "pyproject.toml").read_text()


# From the bottom up: a module imports from rows above its own, or from its own in the order given.
LAYERS = [
    ["_checks", "_once", "_debye", "_distributed", "_shards", "_matmul", "_memory", "_duplicates"],
    [
        "_expansion",
        "_lowering",
        "_compiled",
        "_unit_rows",
        "_state_names",
        "_unattached",
        "_weight_normed",
        "mlp",
        "special",
    ],
    ["prototypes", "regularizers", "optim", "parallel", "head", "centering", "hub", "_target_summary"],
    ["_logits"],
    ["_targets"],
    ["_distillation", "_row_groups"],
    ["_rows_apart", "_rows_together", "_loss_and_gradients", "_chunked_operator", "_chunked", "_at_once"],
    ["cross_entropy", "report", "_first_outputs", "_attached", "teacher"],
    ["mixture.concentration", "mixture._sampling", "mixture.distribution", "mixture._ranks", "mixture._seeding"],
    ["mixture._split_merge"],
    ["mixture._steps", "mixture.online", "mixture.fit", "mixture.scores", "mixture._isometric"],
    ["mixture.compression", "mixture.warm_start", "mixture"],
    ["", "compat", "compat._sinkhorn", "compat._temperature", "compat.convert"],
    ["compat._attached", "compat._late_center"],
    ["compat.dino", "compat.dinov2", "compat.dinov3", "compat.msn", "compat.solo"],
    ["compat.stable_pretraining.projector", "compat.stable_pretraining.dino_loss"],
    ["compat.stable_pretraining.patch_loss", "compat.stable_pretraining.dinov2_loss", "compat.stable_pretraining"],
    ["compat.esvit.view_loss", "compat.esvit.regions", "compat.esvit.region_loss", "compat.esvit"],
    ["compat.ibot.head", "compat.ibot.tokens", "compat.ibot.loss", "compat.ibot"],
    ["compat.lightly.heads", "compat.lightly.dino_loss", "compat.lightly.patch_losses", "compat.lightly"],
]
OPTIONAL = {"hub": {"huggingface_hub", "safetensors"}}
ORDER = [module for layer in LAYERS for module in layer]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def imports(path: Path) -> tuple[set[str], set[str]]:
    """(modules of the library, top-level names from outside) that the file imports, absolute names resolved."""
    inside, outside = set(), set()
    package = ["vmf_heads", *path.relative_to(SOURCE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            found = [".".join([*parents, module]) for module in modules]
        else:
            continue
        for name in found:
            first, _, rest = name.partition(".")
            (inside.add(rest) if first == "vmf_heads" else outside.add(first))
    return inside, outside


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=name_of)
def test_imports_point_one_way(path):
    inside, outside = imports(path)
    optional = OPTIONAL.get(name_of(path), set())  # inside functions, as test_hub.py finds
    assert outside <= {"torch", "numpy"} | optional | sys.stdlib_module_names
    below = ORDER[: ORDER.index(name_of(path))]
    assert inside <= set(below), f"{name_of(path)} imports {inside - set(below)}, which stand above it in ORDER"


def test_the_order_names_every_module_once():
    assert sorted(ORDER) == sorted(name_of(path) for path in SOURCE.rglob("*.py"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (built,) = folder.iterdir()
    return built


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {path.relative_to(ROOT / "src").as_posix() for path in SOURCE.rglob("*") if "__pycache__" not in path.parts}
    files = {name for name in files if (ROOT / "src" / name).is_file()}
    assert "vmf_heads/py.typed" in files
    assert {name for name in names if ".dist-info/" not in name} == files
    assert f"vmf_heads-{vmf_heads.__version__}.dist-info/licenses/LICENSE" in names


@pytest.mark.slow
def test_the_installed_wheel_runs_the_readme(wheel, tmp_path):
    """In a fresh environment outside the tree, which borrows this one's PyTorch and NumPy but not the library."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = Path(run(python, tmp_path, "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    with zipfile.ZipFile(wheel) as archive:  # all that installing a pure Python wheel is
        archive.extractall(site)
    (site / "borrowed.pth").write_text(str(Path(torch.__file__).parents[1]))
    code = "import sys, vmf_heads; print(vmf_heads.__file__, 'torch._dynamo' in sys.modules, sep='\\n')"
    path, compiler = run(python, tmp_path, code).splitlines()
    assert Path(path).is_relative_to(site)
    assert compiler == "False", "the import of torch's compiler takes as long as all others"
    snippet = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert snippet
    run(python, tmp_path, snippet[1])


def run(python: Path, folder: Path, code: str) -> str:
    """What `code` prints; `python` is isolated from the variables of this process."""
    done = subprocess.run([python, "-I", "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
