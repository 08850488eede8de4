"""Weighted nearest neighbours on frozen features."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vicreg_mm.evaluation.features import check_features, check_pair

CHUNK_ELEMENTS = 2**26  # similarities held at once: 256 MiB in float32 (assumed)


def knn_predictions(train_features: Tensor, train_labels: Tensor, test_features: Tensor, k: int = 20, temperature: float = 0.07) -> Tensor:
    """The class of each test row by a weighted vote of its k nearest train rows: [M], int64.

    Similarity is the cosine s; a neighbour votes exp(s / temperature) for its class; on a tie the lower class wins. Exact, a chunk of
    test rows at a time. Features [N, F] and [M, F] on one device, labels [N]. Raises ValueError if k is not in 1 .. N.
    Source: InstDisc (arXiv:1805.01978), section 3.4, and facebookresearch/dino, eval_knn.py (there k = 10, 20, 100, 200).
    """
    check_features(train_features, train_labels, "train")
    if not 1 <= k <= len(train_features):
        raise ValueError(f"k = {k} neighbours of {len(train_features)} train samples")
    bank = F.normalize(train_features.float(), dim=1)
    queries = F.normalize(test_features.float(), dim=1)
    num_classes = int(train_labels.max()) + 1
    predictions = []
    for chunk in queries.split(max(1, CHUNK_ELEMENTS // len(bank))):
        similarities, neighbours = (chunk @ bank.T).topk(k, dim=1)
        # exp((s - 1) / T) is exp(s / T) up to a factor common to all votes
        weights = ((similarities - 1) / temperature).exp()
        votes = weights.new_zeros(len(chunk), num_classes).scatter_add_(1, train_labels[neighbours], weights)
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def knn_accuracy(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """The share in [0, 1] of test rows that `knn_predictions` gets right."""
    check_pair(train_features, train_labels, test_features, test_labels)
    predicted = knn_predictions(train_features, train_labels, test_features, k, temperature)
    return (predicted == test_labels).double().mean().item()
