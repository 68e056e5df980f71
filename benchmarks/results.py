"""Result files: one JSON per benchmark, device and day, with what one needs to repeat it."""

import datetime
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("vmf_heads", "torch", "numpy", "scipy", "mpmath", "pillow", "tensorflow", "tensorflow-probability")


def write(name: str, device: str, rows: list[dict[str, Any]], **settings: Any) -> Path:
    """Write `rows` to results/NAME_DEVICE_DATE.json, one row per line."""
    header = {
        "benchmark": name,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else cpu_model(),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "versions": {package: version for package in PACKAGES if (version := _version(package))},
        **settings,
    }
    lines = [f'  "{key}": {json.dumps(value)},' for key, value in header.items()]
    lines += ['  "rows": [', ",\n".join(f"    {json.dumps(row)}" for row in rows), "  ]"]
    path = RESULTS / f"{name}_{torch.device(device).type}_{header['date']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(["{", *lines, "}", ""]))
    return path


def latest(name: str, device: str = "cpu") -> dict[str, Any]:
    """The newest result file of benchmark `name` on `device`; FileNotFoundError if there is none."""
    paths = sorted(RESULTS.glob(f"{name}_{device}_*.json"))
    if not paths:
        raise FileNotFoundError(f"no {name}_{device}_*.json in {RESULTS}; run `python -m benchmarks` first")
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
