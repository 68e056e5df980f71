"""What a report on prototypes holds, how it reads, and what its numbers say in words."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

# From these on a number is named in the verdict.
LARGE_SET = 0.1  # of the prototypes
ONE_TAKES_ALL = 0.5  # of the rows
SAME_TARGETS = 0.05  # mutual information of row and prototype, as a share of its largest possible value
SAME_FEATURES = 0.99  # length of the mean of unit vectors


@dataclass(frozen=True)
class PrototypeReport:
    """What `prototype_report` found. Print it, or log `as_dict()`; None stands for what the arguments do not tell."""

    prototypes: int  # K
    dim: int  # p
    temperature: float  # that of kappa and of the entropies
    unique: dict[float, int]  # by cosine threshold
    largest_set: dict[float, int]  # by cosine threshold: prototypes in the largest set of duplicates
    kappa: dict[str, float]  # quantiles of ||w|| / temperature: min, p05, p50, p95, max
    rows: int | None = None  # N
    used: int | None = None  # prototypes that are the most probable one of some row
    top_share: float | None = None  # share of the rows that the most used prototype has, in [0, 1]
    target_entropy: float | None = None  # nats: mean entropy of the rows' probabilities, 0 to ln K
    marginal_entropy: float | None = None  # nats: entropy of their mean, target_entropy to ln K
    mean_length: float | None = None  # ||mean of y||, 0 to 1; 1: all features are the same
    void: int | None = None  # prototypes that no row chooses, with a cosine to -mean(y) above void_threshold
    void_threshold: float = 0.9

    @property
    def verdict(self) -> str:
        """What the numbers say about collapse, in one or a few plain sentences."""
        found = [*self._of_prototypes(), *self._of_data()]
        return " ".join(found) or ("No large set of duplicates." if self.rows is None else "No sign of collapse.")

    def as_dict(self) -> dict[str, float]:
        """Flat names and numbers for a logger, such as `unique@0.9`, `kappa_p50` and `void`, without unknown ones.

        Entropies also come as `target_entropy_share` and `marginal_entropy_share`, of ln K.
        """
        numbers: dict[str, float] = {}
        for name, value in asdict(self).items():
            if isinstance(value, dict):
                joint = "_" if name == "kappa" else "@"
                numbers |= {f"{name}{joint}{key}": number for key, number in value.items()}
            elif value is not None:
                numbers[name] = value
                if name.endswith("entropy"):
                    numbers[f"{name}_share"] = self._share(value)
        return numbers

    def __str__(self) -> str:
        lines = [f"{self.prototypes} prototypes of dimension {self.dim}" + (f", {self.rows} rows" if self.rows else "")]
        for threshold, unique in self.unique.items():
            largest = f"largest set of duplicates {self._count(self.largest_set[threshold])}"
            lines.append(f"at cosine {threshold:g}: {self._count(unique)} unique, {largest}")
        if self.void is not None:
            where = f"cosine with -mean(y) above {self.void_threshold:g}, never chosen"
            lines.append(f"void: {self._count(self.void)}, {where}; length of mean(y) {self.mean_length:.3f}")
        if self.used is not None:
            lines.append(f"used: {self._count(self.used)}, the most used one by {self.top_share:.1%} of the rows")
        quantiles = ", ".join(f"{name} {value:.4g}" for name, value in self.kappa.items())
        lines.append(f"kappa at temperature {self.temperature:g}: {quantiles}")
        if self.target_entropy is not None and self.marginal_entropy is not None:
            of_targets, of_mean = map(self._nats, (self.target_entropy, self.marginal_entropy))
            lines.append(f"entropy of the targets {of_targets}, of their mean {of_mean}")
        return "\n  ".join(lines) + f"\n{self.verdict}"

    def _of_prototypes(self) -> list[str]:
        if self.void is not None and self.void >= LARGE_SET * self.prototypes:
            return [
                f"{self.void / self.prototypes:.0%} of the prototypes point straight away from the data and no row "
                "chooses them: a void set."
            ]
        threshold = min(self.largest_set, key=lambda value: abs(value - 0.9))  # the paper's, or the nearest
        share = self.largest_set[threshold] / self.prototypes
        if share < LARGE_SET or self.largest_set[threshold] == 1:
            return []
        where = "" if self.void is not None else "; features would tell whether they point away from the data"
        return [f"{share:.0%} of the prototypes are duplicates of one another{where}."]

    def _of_data(self) -> list[str]:
        if self.rows is None or self.rows < 2:
            return []
        found = []
        if self.mean_length is not None and self.mean_length > SAME_FEATURES:
            found.append("The features are nearly the same in all rows: collapsed.")
        if self.top_share is not None and self.top_share >= ONE_TAKES_ALL and self.prototypes > 2:
            found.append(f"One prototype takes {self.top_share:.0%} of the rows.")
        if self.target_entropy is not None and self.marginal_entropy is not None:
            most = math.log(min(self.prototypes, self.rows))
            if self.marginal_entropy - self.target_entropy < SAME_TARGETS * most:
                found.append("The targets hardly differ between rows: collapsed, or at the start of training.")
        return found

    def _share(self, nats: float) -> float:
        return nats / math.log(self.prototypes) if self.prototypes > 1 else 0.0

    def _nats(self, nats: float) -> str:
        return f"{nats:.2f} nats ({self._share(nats):.2f} ln K)"

    def _count(self, number: int) -> str:
        return f"{number} ({number / self.prototypes:.1%})"
