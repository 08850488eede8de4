"""The images of a source, in a fixed order, before any is read."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

# the first four can go into shards; the others are listed too, so that they are reported and not lost in silence
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLIT_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation"}


class Item(NamedTuple):
    """One image: the file `name` below the listing's root or, where `size` is given, the bytes at `offset` of the root, a tar.

    image_id: the number that its source knows it by, if any.
    """

    name: str
    label: int | None
    offset: int = 0
    size: int | None = None
    captions: tuple[str, ...] = ()
    image_id: int | None = None

    @property
    def annotation(self) -> bytes:
        """The JSON field of a record: captions and image_id; empty for an image without captions."""
        content = {"captions": self.captions} | ({} if self.image_id is None else {"image_id": self.image_id})
        return json.dumps(content, ensure_ascii=False).encode() if self.captions else b""


@dataclass(frozen=True)
class Listing:
    """All images of a source; `classes` names the labels 0, 1, ... and is empty where there are none.

    ignored: the number of files that are no images by their suffix.
    bad: [(name, reason)], images that are no items since their source already shows that they cannot be used.
    lost: [(name, reason)], captions and rows of a table that could not be read. counts: what became of captions -> how many.
    """

    root: Path
    items: list[Item]
    classes: list[str]
    ignored: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    lost: list[tuple[str, str]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


def list_folder(root: Path) -> Listing:
    """Images in class folders, or in one flat folder without labels.

    Labels count the class folders in the order of their names, as torchvision's ImageFolder; below a class folder any depth is searched.
    Hidden files and folders are left out. Raises ValueError for what is no such folder, naming what is wrong.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is a file, not a folder of images" if root.exists() else f"{root} does not exist")
    entries = sorted(entry for entry in os.listdir(root) if not entry.startswith("."))
    classes = [entry for entry in entries if (root / entry).is_dir()]
    files = [entry for entry in entries if entry not in set(classes)]
    images = [name for name in files if is_image(name)]
    if classes and images:
        raise ValueError(f"{root} holds both images ({images[0]}) and folders ({classes[0]}); either is fine, but not both")
    if classes and {name.lower() for name in classes} <= SPLIT_NAMES:
        raise ValueError(f"{root} holds the splits {', '.join(classes)}; pass one of these folders")
    items = [Item(name, None) for name in images]
    ignored = len(files) - len(images)
    for label, name in enumerate(classes):
        below = files_below(root / name)
        found = [Item(f"{name}/{file}", label) for file in below if is_image(file)]
        if not found:
            raise ValueError(f"class folder {root / name} holds no images; remove it (it would be a label)")
        items += found
        ignored += len(below) - len(found)
    if not items:
        raise ValueError(f"{root} holds no images ({', '.join(IMAGE_SUFFIXES[:4])})")
    return Listing(root, items, classes, ignored)


def is_image(name: str) -> bool:
    """Whether the suffix is one of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def files_below(folder: Path) -> list[str]:
    """Paths of all files below `folder`, relative to it, sorted."""
    files = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(place, name).relative_to(folder).as_posix() for name in names if not name.startswith(".")]
    return sorted(files)
