"""What a batch of features says about collapse: pure formulas on [N, F] tensors.

Computed in float64 for float64 input and in float32 for everything else. On several ranks gather the rows first.
"""

import torch
from torch import Tensor


def per_dimension_std(features: Tensor) -> Tensor:
    """The unbiased standard deviation of each dimension: [N, F] -> [F]. Raises ValueError for fewer than 2 rows."""
    return _checked(features, at_least=2).std(dim=0)


def rankme(features: Tensor, eps: float = 1e-7) -> Tensor:
    """The effective rank of the features, a scalar from 1 to min(N, F).

    exp(-sum_k p_k log p_k), p_k = sigma_k / sum_j sigma_j + eps, over the singular values of the uncentred [N, F] matrix. It is
    bounded by N as well as by F: state N, and take N >= 2 F where values are compared. All-zero features give 1 (not in the source).
    Source: RankMe (arXiv:2210.02885), eq. 1; eps as there for float32.
    """
    sigma = torch.linalg.svdvals(_checked(features, at_least=1))
    total = sigma.sum()
    if total == 0:
        return torch.ones_like(total)
    p = sigma / total + eps
    return torch.exp(-(p * p.log()).sum())


def _checked(features: Tensor, at_least: int) -> Tensor:
    if features.ndim != 2 or features.shape[0] < at_least:
        raise ValueError(f"features of shape {list(features.shape)}; [N, F] with N >= {at_least} is needed")
    if not torch.isfinite(features).all():
        raise ValueError("features contain NaN or infinity")
    return features if features.dtype == torch.float64 else features.float()
