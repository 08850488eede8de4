"""Batches of named views for pretraining, and labelled batches for evaluation.

One whole local batch is made in one worker, from its position alone. So the number of workers changes nothing, and a run can start at any
position. A bad record (unreadable, or an image that does not decode) is left out and counted; any other exception is ours and propagates.
"""

import contextlib
import math
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vicreg_mm.input.batch import Batch, Tray
from vicreg_mm.input.plan import Plan, Position
from vicreg_mm.input.shard_cache import CACHE_BYTES
from vicreg_mm.input.shards import Reader, RecordError, Sample, ShardError, ShardIndex
from vicreg_mm.input.text_views import BadCaption, TextViewPolicy
from vicreg_mm.input.views import BadImage, ViewPolicy, decode

Transform = Callable[[np.ndarray], np.ndarray]  # uint8 [H, W, 3] -> uint8 [3, height, width]


def assemble(
    reader: Reader,
    rows: Iterable[int],
    tray: Tray,
    views_of: Callable[[Sample], dict[str, np.ndarray]],
    need_label: bool = False,
    captions: bool = False,
) -> Batch:
    """The batch of these rows. views_of: makes the views of a sample, may raise BadImage and BadCaption. captions: keep them."""
    index = reader.index
    for row in rows:
        try:
            sample = reader.read(row)
            if need_label and sample.label is None:
                raise RecordError(f"{_place(index, row)}: no label")
            views = views_of(sample)
        except RecordError as error:
            tray.leave_out(str(error))
        except BadImage as error:
            tray.leave_out(f"{_place(index, row)}: bad image ({error})")
        except BadCaption as error:
            tray.leave_out(f"{_place(index, row)}: bad caption ({error})")
        else:
            tray.put(views, sample.row, sample.label, sample.image)
            if captions:
                tray.put_captions(sample.captions, sample.num_blank)
    return tray.batch(labelled=index.has_labels, captioned=captions)


def _place(index: ShardIndex, row: int) -> str:
    shard, row_in_shard = index.locate(row)
    return f"shard '{index.shards[shard].name}' row {row_in_shard}"


def start_worker(worker: int) -> None:
    """One core per worker; a signal that a terminal or a scheduler sends to everyone is the main process's to handle."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def stream(dataset: Dataset, sampler: Iterable | None, workers: int, prefetch: int) -> Iterator[Batch]:
    """The items of a dataset that makes whole batches, in order, ahead of need where there are workers.

    A ShardError crosses from a worker as a value, since torch would bury its one line in a traceback.
    """
    loader = DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=start_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or each loader would take a number from the global one and change the run
    )
    batches = iter(loader)
    try:
        for item in batches:
            if isinstance(item, ShardError):
                raise item
            yield item
    finally:
        # left to the garbage collector after an exception, torch waits 5 s for every worker (measured: torch 2.15)
        if hasattr(batches, "_shutdown_workers"):
            batches._shutdown_workers()


def require_images(index: ShardIndex) -> None:
    """Raise ValueError for a set without images."""
    if not index.has_images:
        raise ValueError(f"{index.root} has no images: its fields are {', '.join(index.fields)}")


def require_captions(index: ShardIndex) -> None:
    """Raise ValueError for a set without captions."""
    if not index.has_captions:
        raise ValueError(f"{index.root} has no captions (KEY.txt, or KEY.json with captions): its fields are {', '.join(index.fields)}")


def labels_of(index: ShardIndex) -> torch.Tensor:
    """The labels of all records that have one that can be read, int64; no image is read."""
    reader, labels = Reader(index.with_fields("cls", "json")), []
    for row in range(index.num_samples):
        with contextlib.suppress(RecordError):
            labels.append(reader.read(row).label)
    reader.close()
    return torch.tensor([label for label in labels if label is not None], dtype=torch.int64)


def shapes_of(policy: ViewPolicy, texts: TextViewPolicy | None) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """What a `Tray` must be told of the views."""
    contexts = {} if texts is None else {name: texts.context for name in texts.view_names}
    return {name: (3, size, size) for name, size in policy.view_sizes.items()}, contexts


def share_of(batch: int, world_size: int) -> int:
    """A rank's records of a global batch; raises ValueError unless they are as many on every rank."""
    if batch % world_size:
        raise ValueError(f"batch {batch} does not divide over {world_size} ranks; choose a multiple of {world_size}")
    return batch // world_size


class _PlannedBatches(Dataset):
    """Position -> this rank's part of that global batch. own: its rows there; boxes: give those of the views."""

    def __init__(self, reader: Reader, policy: ViewPolicy, texts: TextViewPolicy | None, plan: Plan, own: tuple[int, int], boxes: bool):
        self.reader, self.policy, self.texts, self.plan, self.own, self.boxes = reader, policy, texts, plan, own, boxes
        self.shapes, self.contexts = shapes_of(policy, texts)

    def __getitem__(self, position: Position) -> Batch | ShardError:
        rows = self.plan.rows(position.epoch, position.step, *self.own)
        tray = Tray(len(rows), self.shapes, self.contexts, self.boxes)

        def views_of(sample: Sample) -> dict[str, np.ndarray]:
            key = (self.plan.seed, position.epoch, sample.shard, sample.row_in_shard)
            texts = {} if self.texts is None else self.texts(sample.captions, key)
            image = decode(sample.image or b"")
            if self.boxes:
                tray.put_boxes(self.policy.boxes(image.shape[0], image.shape[1], key))
            return self.policy(image, key) | texts

        try:
            return assemble(self.reader, rows.tolist(), tray, views_of)
        except ShardError as error:
            return error


def _warn_of_small_cache(index: ShardIndex, plan: Plan, first: int, last: int, cache_bytes: int) -> None:
    """A cache below the shards in use works, but fetches a whole shard for every few samples."""
    needed = sum(index.shards[shard].size for shard in plan.shards_in_use(0, 0, first, last).tolist())
    if needed > cache_bytes:
        warnings.warn(
            f"the shards in use at a time by one rank are {needed / 2**30:.2f} GiB, the cache holds {cache_bytes / 2**30:.2f} GiB: "
            "shards will be fetched again and again; allow more, or lower the slots",
            stacklevel=3,
        )


class PretrainLoader:
    """This rank's part of every planned global batch, as views made by `policy`, and `texts` of the captions.

    rank, world_size: the layout; it decides who gets which rows of a global batch, never which rows are in it.
    boxes: say where in its image every view lies. prefetch: batches ahead per worker. cache_dir, cache_bytes: of remote shards.
    Raises ValueError if the ranks do not divide the batch, if the plan is of another set, or if the set has no images (with
    `texts`: no captions).
    """

    def __init__(
        self,
        index: ShardIndex,
        policy: ViewPolicy,
        plan: Plan,
        *,
        texts: TextViewPolicy | None = None,
        boxes: bool = False,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        cache_dir: str | Path | None = None,
        cache_bytes: int = CACHE_BYTES,
    ):
        require_images(index)
        if texts is not None:
            require_captions(index)
        if plan.counts != index.counts:
            raise ValueError(f"the plan is of {plan.num_samples} samples in {len(plan.counts)} shards, not of {index}")
        share = share_of(plan.batch, world_size)
        self.plan, self.workers, self.prefetch = plan, workers, prefetch
        own = rank * share, (rank + 1) * share
        if index.remote:
            _warn_of_small_cache(index, plan, *own, cache_bytes)
        self._dataset = _PlannedBatches(Reader(index, cache_dir, cache_bytes), policy, texts, plan, own, boxes)

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch

    def batches(self, start: Position, epochs: int) -> Iterator[tuple[Position, Batch]]:
        """Position and batch of every step from `start` to the end of epoch `epochs` - 1 (the run's total, not a number to add)."""
        positions = _Positions(self.plan, start, epochs)
        yield from zip(positions, stream(self._dataset, positions, self.workers, self.prefetch), strict=True)


class _Positions:
    """The positions of a run, for torch's loader, which may iterate them more than once."""

    def __init__(self, plan: Plan, start: Position, epochs: int):
        self.plan, self.start, self.epochs = plan, start, epochs

    def __iter__(self) -> Iterator[Position]:
        return self.plan.positions(self.start, self.epochs)


class _RowBatches(Dataset):
    """Rows -> their batch, with labels or with captions."""

    def __init__(self, reader: Reader, transform: Transform, captions: bool):
        self.reader, self.transform, self.captions = reader, transform, captions
        self.shape = transform(np.zeros((64, 64, 3), np.uint8)).shape

    def __getitem__(self, rows: Sequence[int]) -> Batch | ShardError:
        def views_of(sample: Sample) -> dict[str, np.ndarray]:
            return {"image": self.transform(decode(sample.image or b""))}

        need_label = self.reader.index.has_labels and not self.captions
        try:
            return assemble(self.reader, rows, Tray(len(rows), {"image": self.shape}), views_of, need_label, self.captions)
        except ShardError as error:
            return error


class LabelledLoader:
    """Every sample of a set exactly once, in order, in batches with the view "image"; in a set with labels, unlabelled records are bad.

    The rows are cut into one contiguous part per rank. Every rank takes the same number of batches (`len`), so that collectives match;
    the last one may be smaller, or empty where the parts differ by the one sample that starts a batch. Nothing is padded.
    limit: only so many samples, evenly spaced over the set; 0 for all. captions: give those of every record, and a record without a label,
    too, with the label -1.
    """

    def __init__(
        self,
        index: ShardIndex,
        transform: Transform,
        batch: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        limit: int = 0,
        captions: bool = False,
        cache_dir: str | Path | None = None,
        cache_bytes: int = CACHE_BYTES,
    ):
        require_images(index)
        if batch < 1 or limit < 0:
            raise ValueError(f"batch {batch} must be positive, limit {limit} at least 0")
        self.index, self.workers, self.prefetch = index, workers, prefetch
        self.num_samples = min(limit, index.num_samples) if limit else index.num_samples
        self._dataset = _RowBatches(Reader(index, cache_dir, cache_bytes), transform, captions)
        rows = [n * index.num_samples // self.num_samples for n in range(self.num_samples)] if limit else range(index.num_samples)
        first, last = (self.num_samples * r // world_size for r in (rank, rank + 1))
        largest = math.ceil(self.num_samples / world_size)
        self._batches = [rows[first:last][n : n + batch] for n in range(0, largest, batch)]

    def __len__(self) -> int:
        """The number of batches, the same on every rank."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return stream(self._dataset, self._batches, self.workers, self.prefetch)
