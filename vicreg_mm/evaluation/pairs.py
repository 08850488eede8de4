"""Embeddings of the images and the captions of a set, in the space in which a model compares them, on one rank or many."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vicreg_mm import distributed
from vicreg_mm.evaluation.features import evaluating
from vicreg_mm.input.batch import Batch
from vicreg_mm.input.shards import Reader
from vicreg_mm.input.tokenizers import Tokenizer, pack
from vicreg_mm.model import PretrainModel

TEXTS_AT_ONCE = 1024


class Pairs(NamedTuple):
    """N images and their M captions, on the CPU, the same on every rank."""

    images: Tensor  # [N, D] float32
    texts: Tensor  # [M, D] float32
    image_of_text: Tensor  # [M] int64, the row of a caption's image
    labels: Tensor  # [N] int64, -1 where a record has none

    def captioned(self) -> "Pairs":
        """Without the images that have no caption, which retrieval cannot ask for."""
        kept = torch.bincount(self.image_of_text, minlength=len(self.images)) > 0
        place = torch.cumsum(kept, 0) - 1
        return Pairs(self.images[kept], self.texts, place[self.image_of_text], self.labels[kept])


@torch.no_grad()
def embed_texts(model: PretrainModel, texts: Sequence[str], tokenizer: Tokenizer, context: int, device: torch.device) -> Tensor:
    """Embeddings [M, D] of texts as they are, on the CPU. A text that says nothing to the tokenizer is start and end alone."""
    parts = []
    with evaluating(model):
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            rows = [pack(tokenizer.encode(text), context, tokenizer) for text in texts[first : first + TEXTS_AT_ONCE]]
            parts.append(model.embed_texts(torch.from_numpy(np.stack(rows)).to(device)).float().cpu())
    return torch.cat(parts)


@torch.no_grad()
def embed_pairs(
    model: PretrainModel, loader: Iterable[Batch], reader: Reader, tokenizer: Tokenizer, context: int, device: torch.device
) -> Pairs:
    """Every image of the loaders of all ranks, and all its captions. All ranks must call it.

    loader: this rank's images with the view "image" and their rows, in as many batches as every other rank's (`LabelledLoader`).
    Captions without a visible character are left out. Raises ValueError for a set without images or captions.
    """
    images, labels, texts, owners = [], [], [], []
    count = 0
    for batch in loader:
        with evaluating(model):
            images.append(model.embed_images(batch.views["image"].to(device, non_blocking=True)).float())
        labels.append(torch.full((len(batch.rows),), -1) if batch.labels is None else batch.labels)
        for row in batch.rows.tolist():
            captions = [caption for caption in reader.read(row).captions if tokenizer.encode(caption)]
            texts += captions
            owners += [count] * len(captions)
            count += 1
    own_texts = embed_texts(model, texts, tokenizer, context, device) if texts else images[0].new_zeros(0, images[0].shape[1]).cpu()
    counts = distributed.exchange_counts(count, device)
    before = sum(counts[: distributed.rank()])
    pairs = Pairs(
        _joined(torch.cat(images), device),
        _joined(own_texts, device),
        _joined(torch.tensor(owners, dtype=torch.int64) + before, device),
        _joined(torch.cat(labels), device),
    )
    if not len(pairs.images) or not len(pairs.texts):
        raise ValueError(f"the set has {len(pairs.images)} images and {len(pairs.texts)} captions; both are needed to compare them")
    return pairs


def _joined(rows: Tensor, device: torch.device) -> Tensor:
    """The rows of all ranks, on the CPU; over `device`, since a process group may know no other."""
    return distributed.gather_rows(rows.to(device), distributed.exchange_counts(len(rows), device)).cpu()


def image_text_report(pairs: Pairs, classes: Tensor | None = None) -> dict[str, Any]:
    """Retrieval in both directions beside chance and, with class embeddings [C, D], zero-shot accuracy: rows of plain data.

    Each with the embeddings as they are and, as `centred`, less the mean of their modality, since the two modalities lie apart.
    """
    from vicreg_mm import gauges
    from vicreg_mm.evaluation.retrieval import chance, retrieval
    from vicreg_mm.evaluation.zero_shot import zero_shot

    own = pairs.captioned()
    report: dict[str, Any] = {
        "retrieval": {
            "chance": chance(own.image_of_text, len(own.images)).as_dict(),
            "as they are": retrieval(own.images, own.texts, own.image_of_text).as_dict(),
            "centred": retrieval(own.images, own.texts, own.image_of_text, centre=True).as_dict(),
        },
        "modality_gap": gauges.modality_gap(pairs.images, pairs.texts).item(),
        "rank_images": gauges.rankme(pairs.images).item(),
        "rank_texts": gauges.rankme(pairs.texts).item(),
    }
    if classes is not None:
        labelled = pairs.labels >= 0
        report["zero_shot"] = {
            name: zero_shot(pairs.images[labelled], pairs.labels[labelled], classes, centre=centre)
            for name, centre in (("as they are", False), ("centred", True))
        }
    return report


def image_text_table(report: dict[str, Any]) -> str:
    """The report as fixed-width text."""
    from vicreg_mm.evaluation.retrieval import retrieval_table

    lines = [retrieval_table(report["retrieval"]), ""]
    for name, row in report.get("zero_shot", {}).items():
        interval = f"{100 * row['top_1_low']:.1f} to {100 * row['top_1_high']:.1f}"
        lines.append(
            f"zero-shot, {name}: {100 * row['top_1']:.1f} % ({interval}), chance {100 * row['top_1_chance']:.1f} %, "
            f"{row['num_images']:,} images of {row['num_classes']} classes"
        )
    ranks = f"{report['rank_images']:.1f} of images, {report['rank_texts']:.1f} of texts"
    return "\n".join([*lines, f"modality gap {report['modality_gap']:.3f}; effective rank (RankMe) {ranks}"])
