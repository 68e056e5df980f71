"""Result files: one JSON per benchmark, device and day, with what one needs to repeat it."""

import datetime
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

import vmf_heads

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "numpy", "scipy", "mpmath", "pillow", "tensorflow", "tensorflow-probability")


def write(name: str, device: str, rows: list[dict[str, Any]], *, folder: Path | None = None, **settings: Any) -> Path:
    """Write `rows` to NAME_DEVICE_DATE.json in benchmarks/results, or in `folder`, one row per line.

    Whoever is interrupted while writing leaves the file that was there before.
    """
    header = {
        "benchmark": name,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else cpu_model(),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "versions": {"vmf_heads": vmf_heads.__version__}
        | {package: version for package in PACKAGES if (version := _version(package))},
        **settings,
    }
    lines = [f'  "{key}": {json.dumps(value)},' for key, value in header.items()]
    lines += ['  "rows": [', ",\n".join(f"    {json.dumps(row)}" for row in rows), "  ]"]
    path = (folder or RESULTS) / f"{name}_{torch.device(device).type}_{header['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("\n".join(["{", *lines, "}", ""]))
    return unfinished.replace(path)


def latest(name: str, device: str = "cpu", *, folder: Path | None = None) -> dict[str, Any]:
    """The newest result file of benchmark `name` on `device`; FileNotFoundError if there is none."""
    paths = sorted((folder or RESULTS).glob(f"{name}_{device}_*.json"))
    if not paths:
        raise FileNotFoundError(f"no {name}_{device}_*.json in {folder or RESULTS}; run `python -m benchmarks` first")
    return json.loads(paths[-1].read_text())


def cpu_model() -> str:
    """The processor as the operating system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
