"""The first losses of the CPU recipes, which no change of the code may move by accident.

    python tests/golden.py

writes tests/examples/golden_losses.json anew, for a change that is meant to move them.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

FILE = Path(__file__).parent / "examples" / "golden_losses.json"
RECIPES = [f"photos_{method}{form}" for method in ("dino", "ibot", "msn") for form in ("", "_vmf")]
STEPS = 3


def first_steps(recipe: str, output: Path) -> dict[str, list[float]]:
    """Loss and gradient norm of the recipe's first steps with one thread; the run is left in `output`."""
    import pretrain

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pretrain.main(pretrain.Options(recipe, output, max_steps=STEPS))
    finally:
        torch.set_num_threads(threads)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {name: [row[name] for row in rows] for name in ("loss", "grad_norm")}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "vit_ssl"))
    with tempfile.TemporaryDirectory() as folder:
        golden = {recipe: first_steps(recipe, Path(folder, recipe)) for recipe in RECIPES}
    FILE.write_text(json.dumps(golden, indent=1) + "\n")
    print(f"wrote {FILE}")
