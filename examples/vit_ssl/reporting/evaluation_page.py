"""One page of a checkpoint's evaluations, our numbers first, then the paper's beside them: evaluation.html and .md."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

from config.recipe import Recipe, load_recipe
from reporting.html_parts import chart
from reporting.own_tables import OwnTable, own_tables
from reporting.paper.rows import Row, ablation_row, check_paper_row, paper_row_of
from reporting.paper.sections import Section, all_numbers, section
from reporting.paper.tables import ABLATION, TABLES
from reporting.prototype_charts import draw_chart
from reporting.rows import RESULTS, markdown_table, read_results

TEMPLATE = Path(__file__).parent / "templates" / "evaluation.html"
TITLE = "How good the features are"
PAPER = (
    "Tables of the paper: “DINO as a von Mises-Fisher mixture model” (Govindarajan et al., ICLR 2023). Numbers are per "
    "cent unless a count is meant; a dash: no number."
)
CAPTIONS = {
    "duplicates": "Figures 6 and 7: prototypes that repeat no other one, and the largest set of duplicates.",
    "void": "Where prototypes lie. A void set stands at 1: chosen by no image, and pushed away from all of them.",
    "knn_by_kappa": "Figure 2: kNN accuracy of images by the concentration κ of the component they belong to. Bars: "
    "standard errors over images.",
}


def write_page(
    output: Path,
    rows: Sequence[Row],
    *,
    checkpoint: str,
    recipe: Recipe | None = None,
    paper_row: str | None = None,
    left_out: Mapping[str, str] | None = None,
) -> Path:
    """Write OUTPUT/evaluation.html and OUTPUT/evaluation.md; returns the path of the first.

    They begin with our numbers in plain words. A table of the paper follows where it has a number that can be compared
    with the paper's; with `paper_row`, wherever there is a number.

    Args:
        output: where the evaluation wrote, too: its charts are taken from OUTPUT/prototypes/.
        rows: those of results.jsonl; of several for one cell the last counts.
        checkpoint: what was evaluated; rows of other checkpoints are left out.
        recipe: how it was pretrained, where that is known; tells the row of the paper to compare with.
        paper_row: that row, as in "ViT-S/16 DINO-vMF", in place of the recipe's.
        left_out: by protocol, why it did not run.

    Raises ValueError when the paper has no row of that name.
    """
    check_paper_row(paper_row)
    rows = [row for row in rows if Path(row.get("checkpoint", checkpoint)).resolve() == Path(checkpoint).resolve()]
    reference = paper_row or (paper_row_of(recipe) if recipe else None)
    of_ablation = ablation_row(recipe) if recipe else None
    sections = [
        section(table, rows, of_ablation if table is ABLATION else reference, left_out or {}) for table in TABLES
    ]
    shown = [found for found in sections if not found.empty and (found.comparable or paper_row)]
    parts = _Parts(
        _facts(rows, checkpoint, recipe, reference),
        own_tables(rows, checkpoint),
        shown,
        [f"{found.title}: {found.notes[0]}" for found in sections if found.empty and (shown or paper_row)],
        all_numbers(rows),
    )
    (output / "evaluation.md").write_text(_markdown(parts, output), encoding="utf-8")
    path = output / "evaluation.html"
    path.write_text(_html(parts, output), encoding="utf-8")
    return path


class _Parts(NamedTuple):
    """What is on a page, from top to bottom."""

    facts: list[tuple[str, str]]
    own: list[OwnTable]
    paper: list[Section]
    missing: list[str]  # tables of the paper without a number, and how to fill them
    numbers: list[list[str]]


def _facts(rows: Sequence[Row], checkpoint: str, recipe: Recipe | None, reference: str | None) -> list[tuple[str, str]]:
    facts = [("checkpoint", checkpoint)]
    if recipe:
        kind = {"vit": "vision transformer", "resnet": "ResNet"}[recipe.backbone]
        model = f"{kind} of {recipe.num_hidden_layers} blocks, width {recipe.hidden_size}"
        model += f", patches of {recipe.patch_size} px" if recipe.backbone == "vit" else ""
        facts.append(("pretrained with", f"{recipe.name}: {recipe.method}, {recipe.epochs} epochs on {recipe.dataset}"))
        facts.append(("model", f"{model}, {recipe.out_dim} prototypes"))
    if reference:
        facts.append(("row of the paper", reference))
    if rows:
        first, *_, last = sorted([row["date"][:10] for row in rows] * 2)
        facts.append(("evaluated", first if first == last else f"{first} to {last}"))
    return facts


def _markdown(parts: _Parts, output: Path) -> str:
    lines = [f"# {TITLE}", "\n".join(f"- {name}: {text}" for name, text in parts.facts)]
    for own in parts.own:
        lines += [f"## {own.title}", markdown_table(own.lines), *own.notes]
    if parts.paper:
        lines.append(PAPER)
    for found in parts.paper:
        lines += [f"## {found.title}", markdown_table([found.head, *found.rows]), *found.notes]
    for name, caption in CAPTIONS.items():
        if (output / "prototypes" / f"{name}.svg").is_file():
            lines += [f"![{name}](prototypes/{name}.svg)", caption]
    if parts.missing:
        lines += ["## Tables of the paper without a number", *parts.missing]
    return "\n\n".join([*lines, "## All numbers", markdown_table(parts.numbers)]) + "\n"


def _html(parts: _Parts, output: Path) -> str:
    def table(lines: list[list[str]]) -> str:
        head = "".join(f"<th>{escape(cell)}</th>" for cell in lines[0])
        body = "".join(
            f"<tr><th scope='row'>{escape(line[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in line[1:])}</tr>"
            for line in lines[1:]
        )
        return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"

    def captions(notes: list[str]) -> str:
        return "".join(f"<p class='caption'>{_with_code(note)}</p>" for note in notes)

    own = "".join(
        f"<section class='own'><h2>{escape(found.title)}</h2>{table(found.lines)}"
        f"{''.join(f'<p>{_with_code(note)}</p>' for note in found.notes)}</section>"
        for found in parts.own
    )
    paper = f"<section><p>{escape(PAPER)}</p></section>" if parts.paper else ""
    for found in parts.paper:
        whole = f"<details><summary>The paper's whole table</summary>{table(found.paper)}</details>"
        lines = table([found.head, *found.rows])
        paper += f"<section><h2>{escape(found.title)}</h2>{lines}{captions(found.notes)}{whole}</section>"
    charts = ""
    for name, caption in CAPTIONS.items():
        if draw_chart(output / "prototypes", name):
            drawn = chart(lambda dark, name=name: draw_chart(output / "prototypes", name, dark=dark), caption)
            charts += f"<figure>{drawn}<figcaption>{escape(caption)}</figcaption></figure>"
    missing = ""
    if parts.missing:
        missing = f"<section><h2>Tables of the paper without a number</h2>{captions(parts.missing)}</section>"
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=TITLE,
        facts="".join(f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in parts.facts),
        tables=own + paper,
        charts=f"<section><h2>Charts of the prototypes</h2>{charts}</section>" if charts else "",
        missing=missing,
        numbers=table(parts.numbers),
    )


def _with_code(text: str) -> str:
    return re.sub("`([^`]*)`", r"<code>\1</code>", escape(text))


def write_page_again(output: Path, checkpoint: str | None = None, paper_row: str | None = None) -> Path:
    """Call `write_page` with the rows of OUTPUT/results.jsonl, for the last row's checkpoint unless one is given."""
    rows = read_results(output)
    if not rows:
        raise FileNotFoundError(f"no results in {output}: expected {output / RESULTS}, which evaluate.py writes")
    checkpoint = checkpoint or str(rows[-1].get("checkpoint", output))
    path = Path(checkpoint) / "recipe.yaml"
    recipe = load_recipe(path) if path.is_file() else None
    return write_page(output, rows, checkpoint=checkpoint, recipe=recipe, paper_row=paper_row)
