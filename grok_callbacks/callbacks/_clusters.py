"""Putting samples that belong together side by side."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["order_by_cluster"]

_MOST_CLUSTERS = 12


def order_by_cluster(affinity: Tensor) -> Tensor:
    """An order of the samples by spectral clustering, larger clusters first.

    The leading eigenvectors of the normalised affinity span the clusters' indicators. One sample of each cluster is found by
    pivoting (the row farthest from those chosen before), and the others go to the pivot that they are most like.

    Args:
        affinity: (N, N) symmetric, entries in [0, 1].

    Returns:
        (N,) indices; the given order if an entry is not finite.
    """
    size = len(affinity)
    if size < 3 or not affinity.isfinite().all():
        return torch.arange(size)
    degrees = affinity.sum(1).clamp(min=torch.finfo(affinity.dtype).tiny).rsqrt()
    eigenvalues, vectors = torch.linalg.eigh(degrees[:, None] * affinity * degrees)
    count = int(((eigenvalues > 0.5 * eigenvalues[-1]).sum()).clamp(1, _MOST_CLUSTERS))
    rows = vectors[:, -count:]
    pivots = _pivots(rows, count)
    labels = (rows @ rows[pivots].T).abs().argmax(1)
    sizes = torch.bincount(labels, minlength=count)
    # By size of the cluster, then by how typical a sample is of it.
    keys = sorted(range(size), key=lambda i: (-int(sizes[labels[i]]), int(labels[i]), -float(affinity[i, pivots[labels[i]]])))
    return torch.tensor(keys)


def _pivots(rows: Tensor, count: int) -> list[int]:
    """Rows chosen one after the other, each the longest once the directions of those before are taken out."""
    remaining = rows.clone()
    chosen: list[int] = []
    for _ in range(count):
        index = int(remaining.square().sum(1).argmax())
        chosen.append(index)
        direction = remaining[index] / remaining[index].norm().clamp(min=torch.finfo(rows.dtype).tiny)
        remaining = remaining - (remaining @ direction)[:, None] * direction
    return chosen
