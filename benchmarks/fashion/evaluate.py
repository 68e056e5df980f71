"""What the trained network knows: nearest neighbours, overall and by the concentration of an image's component."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.fashion.data import Images
from benchmarks.fashion.train import Network, Trained
from benchmarks.mixture.measures import entropies, rank_correlation, spread, used
from vmf_heads import prototype_report

COSINES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Above which prototypes count as duplicates, as in Figures 6 and 7 of the paper."""


@torch.no_grad()
def features(network: torch.nn.Module, x: Tensor) -> Tensor:
    """Of images, in chunks."""
    return torch.cat([network(chunk.contiguous(memory_format=torch.channels_last)) for chunk in x.split(1000)])


def nearest_neighbours(
    bank: Tensor, labels: Tensor, queries: Tensor, *, k: int = 10, temperature: float = 0.07
) -> Tensor:
    """The class (N,) for which the k nearest of the bank vote, each with weight exp(cosine / temperature)."""
    bank = F.normalize(bank, dim=1)
    predicted = []
    for chunk in F.normalize(queries, dim=1).split(1000):
        cosine, index = (chunk @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(chunk), int(labels.max()) + 1)
        predicted.append(votes.scatter_add_(1, labels[index], ((cosine - 1) / temperature).exp()).argmax(1))
    return torch.cat(predicted)


@torch.no_grad()
def evaluate(trained: Trained, bank: Images, queries: Images) -> dict[str, Any]:
    """kNN with the teacher's features, and what its prototypes do, on the same images."""
    teacher: Network = trained.teacher.eval()
    in_bank, in_queries = features(teacher.backbone, bank.x), features(teacher.backbone, queries.x)
    correct = (nearest_neighbours(in_bank, bank.labels, in_queries) == queries.labels).float()
    head = teacher.head
    norms, tau = head.last_layer.norms, trained.loss.student_temp
    scores = head(in_queries)  # raw: the loss is attached
    logits = scores / tau + head.log_normalizer(tau)
    targets = trained.loss.targets(scores, 0)
    winner = logits.argmax(1)
    order = norms[winner].argsort(stable=True)
    fifths = [float(correct[part].mean()) for part in order.chunk(5)]
    counts = winner.bincount(minlength=len(norms))
    many = counts >= 10
    accuracy = torch.zeros(len(norms)).index_add_(0, winner, correct)[many] / counts[many]
    low, high = norms[winner].quantile(torch.tensor([0.05, 0.95]))
    report = prototype_report(head.last_layer.weight, temperature=tau, thresholds=COSINES)
    return {
        "knn": float(correct.mean()),
        "knn_by_fifth": fifths,
        "rank_correlation_accuracy": rank_correlation(norms[many], accuracy),
        "used_by_scores": used(scores),
        "used_by_logits": used(logits),
        "used_by_targets": used(targets),
        "used_over_time": trained.used_over_time,
        "unique": [report.unique[cosine] / report.prototypes for cosine in COSINES],
        "largest_set": [report.largest_set[cosine] / report.prototypes for cosine in COSINES],
        **entropies(targets),
        "kappa_min": float(norms.min()) / tau,
        "kappa_max": float(norms.max()) / tau,
        "kappa_spread": spread(norms),
        "kappa_spread_of_images": float(high / low.clamp(min=1e-6)),
        "loss": sum(trained.losses[-100:]) / len(trained.losses[-100:]),
    }
