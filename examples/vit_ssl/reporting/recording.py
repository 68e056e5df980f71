"""One protocol from start to end: run, and its rows, predictions and charts written."""

from __future__ import annotations

import time
from typing import Any

from config.settings import check_finite
from evaluators.protocol import Evaluation
from evaluators.registry import PROTOCOLS
from evaluators.request import Request
from reporting.rows import RESULTS, Row, make_rows, save_predictions
from runtime.distributed import is_main
from storage.json_lines import append_rows


def run_protocol(name: str, evaluation: Evaluation, options: Any, request: Request) -> list[Row]:
    """Run one protocol; return its rows, appended to results.jsonl, and write its predictions to predictions/."""
    protocol = PROTOCOLS[name]
    check_finite(options)
    split = protocol.split or evaluation.split
    common: dict[str, Any] = {"checkpoint": request.checkpoint}
    if data := evaluation.data or evaluation.dataset:
        common["data"] = str(data)
    if protocol.features and evaluation.dataset:
        common["n"] = len(evaluation.features(split).labels)  # extracted before the clock starts
    start = time.perf_counter()
    metrics = list(protocol.evaluate(evaluation, options))
    common["seconds"] = round(time.perf_counter() - start, 3)
    rows = make_rows(metrics, protocol=protocol.rows_as or name, features=request.features, split=split, **common)
    if is_main():
        save_predictions(evaluation.output, name, request.features, split, metrics)
        if name == "prototypes":
            from reporting.prototype_charts import draw_charts  # imported here because the other protocols draw nothing

            draw_charts(evaluation.output / "prototypes")
        append_rows(evaluation.output / RESULTS, rows)  # last: a row says that all the rest is there
    return rows
