"""Frozen features of a whole labelled set, in the order of the data, on one rank or many."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vicreg_mm import distributed

Encode = Callable[[Tensor], Tensor]  # uint8 images [n, 3, H, W] -> features [n, F]


@torch.no_grad()
def extract_features(encode: Encode, loader: Iterable[Any], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Features [N, F], float32, and labels [N], int64, of all samples of the loaders of all ranks, on the CPU of every rank.

    encode: uint8 images [n, 3, H, W] on `device` to features [n, F]; it normalises, and sees to evaluation mode (`frozen` does both).
    loader: batches with `views["image"]` and `labels`, this rank's contiguous part of the data; ranks may have unequal numbers of samples
    and of batches, even none. N counts what was decoded: a bad record is left out.
    Raises ValueError, on every rank, for an empty set, a set without labels, or features that are not finite.
    """
    features: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in loader:
        images = batch.views["image"]
        if len(images) == 0:
            continue
        rows = encode(images.to(device, non_blocking=True))
        features.append(rows.float().flatten(1).cpu())
        labels.append(torch.full((len(images),), -1) if batch.labels is None else batch.labels.cpu().long())
    gathered, classes = _gathered(features, labels, torch.device(device))
    check_features(gathered, classes, "the")
    return gathered, classes


def frozen(encoder: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> Encode:
    """An `encode` for `extract_features`: uint8 images / 255, normalised by channel, through `encoder` in evaluation mode.

    The mode of every submodule is put back after each batch, so that an encoder in training can be looked at.
    """

    def encode(images: Tensor) -> Tensor:
        scale = torch.tensor(std, device=images.device).view(-1, 1, 1)
        shift = torch.tensor(mean, device=images.device).view(-1, 1, 1)
        with evaluating(encoder):
            return encoder((images.float() / 255 - shift) / scale)

    return encode


def raw_pixels(images: Tensor) -> Tensor:
    """The `encode` of the first row of every table: pixel values in [0, 1] as they are, [n, 3, H, W] -> [n, 3 H W]."""
    return images.flatten(1).float() / 255


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; each submodule then has its own mode back (a part may have been frozen)."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def check_features(features: Tensor, labels: Tensor, name: str) -> None:
    """Raise ValueError unless these are finite features [N, F] with a label >= 0 for each of N >= 1 rows."""
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"{name} features have shape {list(features.shape)}; [N, F] with N >= 1 is needed")
    if labels.shape != features.shape[:1]:
        raise ValueError(f"{name} features are {len(features)} but their labels {list(labels.shape)}")
    unlabelled = int((labels < 0).sum())
    if unlabelled:
        raise ValueError(f"{unlabelled} of {len(labels)} samples have no label; evaluation needs shards with KEY.cls")
    broken = int((~torch.isfinite(features)).any(dim=1).sum())
    if broken:
        raise ValueError(f"{name} features of {broken} of {len(features)} samples contain NaN or infinity")


def check_pair(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor) -> None:
    """Raise ValueError unless train and test set fit together: both sound, of one width, no test class unknown to the train set."""
    check_features(train_features, train_labels, "train")
    check_features(test_features, test_labels, "test")
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(f"train features have {train_features.shape[1]} dimensions, test features {test_features.shape[1]}")
    unknown = sorted(set(test_labels.unique().tolist()) - set(train_labels.unique().tolist()))
    if unknown:
        raise ValueError(f"test labels {', '.join(map(str, unknown[:5]))} do not occur in the train set: are both from one data set?")


def _gathered(features: list[Tensor], labels: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows of all ranks, in rank order, which is the order of the data."""
    num_rows = sum(len(rows) for rows in features)
    counts = distributed.exchange_counts(num_rows, device)
    # a rank without samples does not know the width; it learns it here
    width = max(distributed.exchange_counts(features[0].shape[1] if features else 0, device))
    mine = torch.cat(features) if features else torch.empty(0, width)
    classes = torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64)
    if distributed.world_size() == 1:
        return mine, classes
    # over `device`, since a process group may know no other
    return distributed.gather_rows(mine.to(device), counts).cpu(), distributed.gather_rows(classes.to(device), counts).cpu()
