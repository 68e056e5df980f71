"""Attentive probes: a learned query attends to frozen patch tokens, and a linear classifier takes what it gathers.

Module, optimiser and schedule are those of CAPI's `eval_classification.py` (Darcet et al., "Cluster and predict latent
patches for improved masked image modeling", 2025), whose probe is AIM's (El-Nouby et al., "Scalable pre-training of
large autoregressive image models", ICML 2024) without its BatchNorm. V-JEPA's (Bardes et al., 2024) has an MLP, too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluators.linear.sgd_probe import Epochs, Schedule, minimise
from runtime.distributed import device

HEAD_WIDTH = 64
"""There is a head for every so many features, as in CAPI."""


class AttentiveProbe(nn.Module):
    """One query (D,) in `heads` heads, keys and values that are linear in the tokens, and a linear classifier."""

    def __init__(self, dim: int, classes: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.empty(dim))
        self.key_and_value = nn.Linear(dim, 2 * dim)
        self.classifier = nn.Linear(dim, classes)
        for weight in (self.query, self.key_and_value.weight, self.classifier.weight):
            nn.init.trunc_normal_(weight, std=0.02)
        for layer in (self.key_and_value, self.classifier):
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, classes) of tokens (B, N, D)."""
        query = self.query.expand(len(tokens), 1, -1)
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, 1 or N, D / heads)
            for part in (query, *self.key_and_value(tokens).chunk(2, dim=2))
        )
        gathered = F.scaled_dot_product_attention(query, key, value)
        return self.classifier(gathered.flatten(1))


class AttentiveProbes(nn.Module):
    """A probe for each setting; they share nothing but their inputs, patch tokens one after the other (B, N*D)."""

    def __init__(self, dim: int, classes: int, heads: int, count: int) -> None:
        super().__init__()
        self.dim = dim
        self.probes = nn.ModuleList([AttentiveProbe(dim, classes, heads) for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (count, B, classes)."""
        tokens = x.unflatten(1, (-1, self.dim))
        return torch.stack([probe(tokens) for probe in self.probes])


def train_attentive_probes(
    epochs: Epochs, steps: int, dim: int, classes: int, heads: int, schedule: Schedule, weight_decays: Sequence[float]
) -> AttentiveProbes:
    """Train a probe for every pair of a learning rate and a weight decay, in that order, in one pass over the batches.

    `steps` is the number of batches of an epoch. AdamW with betas (0.9, 0.95); the learning rates rise during the first
    tenth of all steps, and fall on half a cosine. Biases are not decayed.
    """
    settings = list(itertools.product(schedule.lrs, weight_decays))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(schedule.seed)
        probes = AttentiveProbes(dim, classes, heads, len(settings)).to(device())
    groups = []
    for probe, (lr, weight_decay) in zip(probes.probes, settings, strict=True):
        for is_bias, decay in {True: 0.0, False: weight_decay}.items():
            own = [value for name, value in probe.named_parameters() if name.endswith("bias") == is_bias]
            groups.append({"params": own, "lr": lr * schedule.batch_size / 256, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    total = steps * schedule.epochs
    warmup = total // 10

    def share_of_rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_rate)
    stacks = {"patches": probes}
    minimise(stacks, optimizer, epochs, schedule.epochs, what="attentive probes", after_step=scheduler.step)
    return probes
