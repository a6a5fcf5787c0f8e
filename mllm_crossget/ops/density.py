"""Clusters around density peaks (DPC-kNN), without randomness.

Shape suffixes: N tokens, D width, C clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def density_peaks(tokens_ND: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Cluster tokens around those that are dense and far from denser ones.

    A token's density is exp(-mean of its squared distances to the ``clusters`` nearest tokens, itself included), with
    distances divided by the square root of the width. The centres have the largest product of density and distance to
    the nearest denser token; for the densest it is the largest distance. Every other token belongs to the nearest
    centre. Among equal values the lower index comes first.

    Args:
        tokens_ND: any float dtype; compared in float32.
        clusters: between 1 and N.

    Returns:
        (C,) the centres, ascending, and (N,) the number of each token's centre among them.
    """
    tokens = tokens_ND.float() / tokens_ND.shape[1] ** 0.5
    distance = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distance.sort(dim=1).values[:, :clusters]
    density = (-(nearest**2).mean(dim=1)).exp()
    rank = density.argsort(descending=True, stable=True).argsort()
    denser = rank[None] < rank[:, None]
    apart = distance.masked_fill(~denser, torch.inf).amin(dim=1)
    apart = torch.where(rank == 0, distance.amax(), apart)
    centres = (density * apart).argsort(descending=True, stable=True)[:clusters].sort().values
    owner = distance[:, centres].argmin(dim=1)
    return centres, owner.scatter(0, centres, torch.arange(clusters, device=owner.device))
