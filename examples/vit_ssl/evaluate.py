"""Evaluate a frozen vision transformer: python examples/vit_ssl/evaluate.py PROTOCOL --checkpoint X.

X is a run of pretrain.py, a folder or hub name that transformers' AutoModel opens, timm:NAME, or an original .pth file
of DINO, iBOT, MSN, DINOv2 or DINOv3. Under torchrun all processes share the work. `evaluate.py PROTOCOL --help` lists a
protocol's settings;
`evaluate.py all` runs what the checkpoint and the data allow and writes evaluation.html and evaluation.md;
`evaluate.py compare RUN ...` tells whether runs are better than raw pixels, a random network and each other;
`evaluate.py page OUTPUT` writes the page again from the rows of any number of evaluations in OUTPUT/results.jsonl.
"""

from __future__ import annotations

from runtime.ending import sound_ending

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from transformers.utils import logging as transformers_logging

from config.settings import check_finite
from evaluators.protocol import NotApplicable
from evaluators.registry import PROTOCOLS
from evaluators.request import Request, open_evaluation
from reporting.paper.rows import check_paper_row
from reporting.recording import run_protocol
from reporting.rows import Row, print_table, read_results
from reporting.several_runs.compare import Comparing, compare
from runtime.distributed import is_main, process_group

PAPER_ROW = (
    "Model of the paper's tables to compare with, like 'ViT-S/16 DINO-vMF'; by default the one of the run's recipe."
)


def evaluate(request: Request, name: str, options: Any = None) -> list[Row]:
    """Run one protocol; append its numbers to OUTPUT/results.jsonl, print them as a table and return them as rows.

    `options` are those of the protocol, None: its defaults. Call it on all ranks; the main one writes.
    """
    rows = run_protocol(name, open_evaluation(request), options or PROTOCOLS[name].options(), request)
    if is_main():
        print_table(rows)
    return rows


def evaluate_all(
    request: Request,
    options: Mapping[str, Any] | None = None,
    folders: Mapping[str, Path | None] | None = None,
    paper_row: str | None = None,
) -> list[Row]:
    """Run every protocol that the checkpoint and the data allow, as `evaluate`, and write the page of all results.

    Args:
        request: what is evaluated.
        options: by protocol, those that are not the defaults.
        folders: by protocol, the data of those with data of their own kind, which do not run without.
        paper_row: the row of the paper's tables to compare with, in place of the recipe's.
    """
    check_paper_row(paper_row)
    for name, folder in (folders or {}).items():
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"`{name}_data` (={str(folder)!r}) must be a folder")
    for settings in (options or {}).values():
        check_finite(settings)
    evaluation = open_evaluation(request)
    rows: list[Row] = []
    left_out = {name: f"{name}: {protocol.left_out}" for name, protocol in PROTOCOLS.items() if protocol.left_out}
    for name, protocol in PROTOCOLS.items():
        if protocol.left_out:
            continue
        data = (folders or {}).get(name) if protocol.own_data else evaluation.data
        settings = (options or {}).get(name) or protocol.options()
        try:
            if protocol.own_data and data is None:
                raise NotApplicable(f"it needs a folder of its own, --{name}-data")
            rows += run_protocol(name, dataclasses.replace(evaluation, data=data), settings, request)
        except NotApplicable as reason:
            left_out[name] = f"{name}: {reason}"
            if is_main():
                print(f"{name} is left out: {reason}")
    if is_main():
        print_table(rows)
    if is_main() and request.features == "teacher":
        from reporting.evaluation_page import write_page  # imported here because single protocols draw nothing

        page = write_page(
            evaluation.output,
            read_results(evaluation.output),
            checkpoint=request.checkpoint,
            recipe=evaluation.run.recipe if evaluation.run else None,
            paper_row=paper_row,
            left_out=left_out,
        )
        print(f"Page: {page}")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, which has a sub-command for each protocol, `all`, `compare` and `page`."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    commands = {name: _command(name) for name in PROTOCOLS} | {
        "all": _all_command(),
        "compare": _compare,
        "page": _page,
    }
    with process_group():
        tyro.extras.subcommand_cli_from_dict(commands, args=arguments)


def _compare(asked: Annotated[Comparing, tyro.conf.arg(name="")]) -> None:
    """Raw pixels, a random network and any number of runs side by side, with paired standard errors."""
    if text := compare(asked):
        print(text)


def _page(output: Path, /, checkpoint: str | None = None, paper_row: str | None = None, debug: bool = False) -> None:
    """Write the page of all results again, from OUTPUT/results.jsonl.

    Args:
        output: directory of the evaluations, which may be the run itself.
        checkpoint: what was evaluated; by default that of the last row.
        paper_row: the row of the paper's tables to compare with, such as "ViT-S/16 DINO-vMF".
        debug: show the traceback of an error.
    """
    from reporting.evaluation_page import write_page_again  # imported here because single protocols draw nothing

    print(write_page_again(output, checkpoint, paper_row))


def _command(name: str) -> Callable[..., None]:
    def run(request: Request, options: Any) -> None:
        evaluate(request, name, options)

    return _with_options(run, PROTOCOLS[name].options)


def _all_command() -> Callable[..., None]:
    included = {name: protocol for name, protocol in PROTOCOLS.items() if not protocol.left_out}
    own_data = [name for name, protocol in included.items() if protocol.own_data]

    def run(request: Request, options: Any) -> None:
        folders = {name: getattr(options, f"{name}_data") for name in own_data}
        evaluate_all(request, {name: getattr(options, name) for name in included}, folders, options.paper_row)

    fields: list[Any] = [(name, protocol.options, protocol.options()) for name, protocol in included.items()]
    for name in own_data:
        fields.append((f"{name}_data", _helped(Path | None, f"Folder for {name}, which does not run without."), None))
    fields.append(("paper_row", _helped(str | None, PAPER_ROW), None))
    options = dataclasses.make_dataclass("AllOptions", fields, frozen=True)
    options.__doc__ = "Every protocol that the checkpoint and the data allow, and a page of all results."
    return _with_options(run, options)


def _helped(kind: Any, text: str) -> Any:
    return Annotated[kind, tyro.conf.arg(help=text)]


def _with_options(run: Callable[[Request, Any], None], options: type[Any]) -> Callable[..., None]:
    # tyro reads these annotations: settings without a prefix, under the description of the options.
    flat = tyro.conf.arg(name="")
    run.__annotations__ = {"request": Annotated[Request, flat], "options": Annotated[options, flat], "return": None}
    run.__doc__ = options.__doc__
    return run


if __name__ == "__main__":
    with sound_ending():
        main()
