"""What a batch of features says about collapse: pure formulas on [N, F] tensors.

Computed in float64 for float64 input and in float32 for everything else. On several ranks gather the rows first.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


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


def modality_gap(a: Tensor, b: Tensor) -> Tensor:
    """The distance between the centres of two modalities on the unit sphere, a scalar from 0 (one place) to 2 (opposite points).

    || mean_n a_n / ||a_n|| - mean_m b_m / ||b_m|| ||, a row of zeros staying where it is. a: [N, D]; b: [M, D], in no particular order: it
    compares the clouds, not the pairs, and is 0 for two collapsed encoders with one output.
    Raises ValueError for different widths, empty or not finite embeddings.
    Source: Liang et al. (arXiv:2203.02053), the norm of their modality gap (there N = M).
    """
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(f"embeddings of shapes {list(a.shape)} and {list(b.shape)}; one width is needed for a gap between them")
    centres = [F.normalize(_checked(rows, at_least=1), dim=1).mean(dim=0) for rows in (a, b)]
    return torch.linalg.vector_norm(centres[0] - centres[1])


def _checked(features: Tensor, at_least: int) -> Tensor:
    if features.ndim != 2 or features.shape[0] < at_least:
        raise ValueError(f"features of shape {list(features.shape)}; [N, F] with N >= {at_least} is needed")
    if not torch.isfinite(features).all():
        raise ValueError("features contain NaN or infinity")
    return features if features.dtype == torch.float64 else features.float()
