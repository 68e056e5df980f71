"""Tables of the runs on known mixtures."""

from typing import Any

from benchmarks.evidence.summary import Rows, select, table, text
from benchmarks.mixture.train import Settings

MAIN = ("none, logit", "none, probability", "L2, logit", "vMF, scores", "vMF, responsibilities", "vMF, targets")
DEFAULTS = Settings()
MEASURES = {
    "used: scores": "used_by_scores",
    "logits": "used_by_logits",
    "targets": "used_by_targets",
    "purity": "purity",
    "rank: true κ": "rank_correlation",
    "own κ": "rank_correlation_own",
    "H(mean)": "marginal_entropy",
}
COLLAPSED = 0.1
"""Below this entropy of the mean target, over ln K, nearly all images have one and the same target."""
"""Their names in the result files, by the heads of their columns."""


def summary(result: dict[str, Any]) -> str:
    """Plain DINO, DINO with L2-normalised prototypes and DINO-vMF by both readings, p = 16, fast norms."""
    names = {
        "DINO": "none, logit",
        "DINO, L2-normalised prototypes": "L2, logit",
        "DINO-vMF, centre on scores": "vMF, scores",
        "DINO-vMF, centre on responsibilities": "vMF, responsibilities",
    }
    measures = ("used_by_logits", "purity", "rank_correlation")
    lines = []
    for name, arm in names.items():
        rows = select(result["rows"], arm=arm, p=16, prototypes=64, norm_decay=0.0)
        own = select(rows, norm_speed=1.0 if arm.startswith("L2") else 3.0)
        lines.append((name, *(_of(own, measure) for measure in measures)))
    return table(("", "prototypes used", "purity", "rank correlation of ‖w‖ with the true κ"), lines)


def readings(result: dict[str, Any]) -> str:
    """p = 16, more prototypes than clusters: every contender at every speed of the norms."""
    rows = select(result["rows"], p=16, prototypes=64)
    header = ("norms", "normalisation, centre", *MEASURES)
    lines = []
    for speed, decay in dict.fromkeys((row["norm_speed"], row["norm_decay"]) for row in rows):
        of_speed = select(rows, norm_speed=speed, norm_decay=decay)
        for arm in dict.fromkeys(row["arm"] for row in of_speed):
            own = select(of_speed, arm=arm)
            norms = "fixed" if arm.startswith("L2") else f"× {speed:g}" + (f", decay {decay:g}" if decay else "")
            lines.append((norms, arm, *_measures(own)))
    return table(header, lines)


def other_problems(result: dict[str, Any]) -> str:
    """The other p, and fewer prototypes than clusters: at three times the learning rate for the norms."""
    header = ("p", "K", "ceiling", "normalisation, centre", *MEASURES)
    lines = []
    cases = dict.fromkeys((row["prototypes"], row["p"]) for row in result["rows"])
    for prototypes, p in sorted(cases, key=lambda case: (-case[0], case[1])):
        rows = select(result["rows"], p=p, prototypes=prototypes, norm_decay=0.0)
        if (prototypes, p) == (64, 16):
            continue  # has a table of its own
        for arm in MAIN:
            own = select(rows, arm=arm, norm_speed=1.0 if arm.startswith("L2") else 3.0)
            ceiling = text([row["oracle_purity"] for row in own]) if prototypes >= 16 else "–"
            lines.append((str(p), str(prototypes), ceiling, arm, *_measures(own)))
    return table(header, lines)


def kappa(result: dict[str, Any]) -> str:
    """How far the norms get, by what they are allowed."""
    header = ("p", "change", "normalisation, centre", "κ₉₅ / κ₅", "‖w‖", "used: logits", "rank correlation")
    lines = []
    for p, change in dict.fromkeys((row["p"], change_of(row)) for row in result["rows"]):
        rows = [row for row in select(result["rows"], p=p) if change_of(row) == change]
        for arm in dict.fromkeys(row["arm"] for row in rows):
            own = select(rows, arm=arm)
            extremes = f"{_mean(own, 'norm_min'):.2f} to {_mean(own, 'norm_max'):.2f}"
            spread = text([row["kappa_spread"] for row in own], digits=1)
            lines.append(
                (str(p), change, arm, spread, extremes, _of(own, "used_by_logits"), _of(own, "rank_correlation"))
            )
    return table(header, lines)


def stability(result: dict[str, Any]) -> str:
    """One line per invitation to trouble: the share of prototypes in use, the largest rise of the loss, collapses."""
    arms = list(dict.fromkeys(row["arm"] for row in result["rows"]))
    lines = []
    for p, change in dict.fromkeys((row["p"], change_of(row)) for row in result["rows"]):
        rows = [row for row in select(result["rows"], p=p) if change_of(row) == change]
        cells = []
        for arm in arms:
            own = select(rows, arm=arm)
            cells.append(_outcome(own) if own else "–")
        lines.append((str(p), change, *cells))
    return table(("p", "change", *arms), lines)


def change_of(row: dict[str, Any]) -> str:
    """What differs from the default settings, in words."""
    words = {
        "prototypes": "K {}",
        "norm_speed": "norms × {:g}",
        "norm_decay": "decay of the norms {:g}",
        "initial_norm": "norms start at {:g}",
        "steps": "{} steps",
        "batch": "batch {}",
        "lr": "lr {:g}",
        "teacher_temp": "teacher's τ {:g}",
        "center_momentum": "momentum of the centre {:g}",
    }
    changed = [word.format(row[name]) for name, word in words.items() if row[name] != getattr(DEFAULTS, name)]
    return ", ".join(changed) or "none"


def _outcome(rows: Rows) -> str:
    used, rise = (f"{_mean(rows, name):.2f}" for name in ("used_by_logits", "spike"))
    collapsed = sum(not row["finite"] or row["marginal_entropy"] < COLLAPSED for row in rows)
    return f"{used}, {rise}" + (f", **{collapsed} of {len(rows)} collapsed**" if collapsed else "")


def _measures(rows: Rows) -> tuple[str, ...]:
    return tuple(_of(rows, name) for name in MEASURES.values())


def _of(rows: Rows, name: str) -> str:
    return text([row[name] for row in rows], signed="correlation" in name)


def _mean(rows: Rows, name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)
