"""One page of a checkpoint's evaluations in the shape of the paper's tables: evaluation.html and evaluation.md."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from config.recipe import Recipe, load_recipe
from reporting.html_parts import chart
from reporting.paper_rows import Row, ablation_row, check_paper_row, paper_row_of
from reporting.paper_sections import Section, all_numbers, section
from reporting.paper_tables import ABLATION, TABLES
from reporting.prototype_charts import draw_chart
from reporting.rows import RESULTS, read_results

TEMPLATE = Path(__file__).parent / "templates" / "evaluation.html"
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
    facts = _facts(rows, checkpoint, recipe, reference)
    (output / "evaluation.md").write_text(_markdown(facts, sections, output, rows), encoding="utf-8")
    path = output / "evaluation.html"
    path.write_text(_html(facts, sections, output, rows), encoding="utf-8")
    return path


def _facts(rows: Sequence[Row], checkpoint: str, recipe: Recipe | None, reference: str | None) -> list[tuple[str, str]]:
    facts = [("checkpoint", checkpoint)]
    if recipe:
        kind = {"vit": "vision transformer", "resnet": "ResNet"}[recipe.backbone]
        model = f"{kind} of {recipe.num_hidden_layers} blocks, width {recipe.hidden_size}"
        model += f", patches of {recipe.patch_size} px" if recipe.backbone == "vit" else ""
        facts.append(("pretrained with", f"{recipe.name}: {recipe.method}, {recipe.epochs} epochs on {recipe.dataset}"))
        facts.append(("model", f"{model}, {recipe.out_dim} prototypes"))
    facts.append(("row of the paper", reference or "none"))
    if rows:
        first, *_, last = sorted([row["date"][:10] for row in rows] * 2)
        facts.append(("evaluated", first if first == last else f"{first} to {last}"))
    return facts


def _markdown(facts: list[tuple[str, str]], sections: list[Section], output: Path, rows: Sequence[Row]) -> str:
    def table(lines: list[list[str]]) -> str:
        lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        rule = ["---"] * len(lines[0])
        return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])

    parts = ["# Evaluation in the shape of the paper's tables", "\n".join(f"- {name}: {text}" for name, text in facts)]
    for found in sections:
        parts += [f"## {found.title}", table([found.head, *found.rows]), *found.notes]
    for name, caption in CAPTIONS.items():
        if (output / "prototypes" / f"{name}.svg").is_file():
            parts += [f"![{name}](prototypes/{name}.svg)", caption]
    parts += ["## All numbers", table(all_numbers(rows))]
    return "\n\n".join(parts) + "\n"


def _html(facts: list[tuple[str, str]], sections: list[Section], output: Path, rows: Sequence[Row]) -> str:
    def table(lines: list[list[str]]) -> str:
        head = "".join(f"<th>{escape(cell)}</th>" for cell in lines[0])
        body = "".join(
            f"<tr><th scope='row'>{escape(line[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in line[1:])}</tr>"
            for line in lines[1:]
        )
        return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"

    tables = ""
    for found in sections:
        notes = "".join(f"<p class='caption'>{_with_code(note)}</p>" for note in found.notes)
        whole = f"<details><summary>The paper's whole table</summary>{table(found.paper)}</details>"
        tables += f"<section><h2>{escape(found.title)}</h2>{table([found.head, *found.rows])}{notes}{whole}</section>"
    charts = ""
    for name, caption in CAPTIONS.items():
        if draw_chart(output / "prototypes", name):
            drawn = chart(lambda dark, name=name: draw_chart(output / "prototypes", name, dark=dark), caption)
            charts += f"<figure>{drawn}<figcaption>{escape(caption)}</figcaption></figure>"
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        facts="".join(f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in facts),
        tables=tables,
        charts=charts or "<p>No prototypes were analysed.</p>",
        numbers=table(all_numbers(rows)),
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
