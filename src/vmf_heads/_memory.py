"""How many rows of a (rows, K) tensor may exist at a time: the one place that budgets memory and cache."""

from __future__ import annotations

import torch

# One chunk takes at most so many bytes, all its buffers together. The more rows it has, the less often the prototypes
# are read, and it should be small beside the logits of a whole batch. What is allocated chunk by chunk has several
# buffers, each below 32 MiB: from there glibc's malloc asks the system for fresh pages every time, and those take as
# long as a matrix product. The loss takes its memory once a call.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 128 * 2**20}
# Several elementwise passes over a block of this size find it in a cache.
CACHE_BYTES = 2 * 2**20


def rows_per_chunk(columns: int, device: torch.device, buffers: int = 1) -> int:
    """How many rows (at least 1) of float32 fit into a chunk, if `buffers` tensors hold such rows at once."""
    return max(1, CHUNK_BYTES.get(device.type, 2**25) // (4 * columns * buffers))
