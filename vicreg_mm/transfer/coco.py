"""COCO's annotation format and folders, as they are downloaded or as other sets imitate them.

FOLDER/annotations/instances_train2017.json   FOLDER/train2017/000000000009.jpg
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from vicreg_mm.transfer.instances import InstanceMasks, InstanceSet, Tally, files_in

_NOT_THERE = "instances of images that are not there"
_KEYS = {
    "images": {"id", "file_name", "height", "width"},
    "annotations": {"id", "image_id", "category_id", "bbox"},
    "categories": {"id", "name"},
}


def find_coco(folder: str | Path, split: str) -> tuple[Path, Path]:
    """The annotations and the images of a split ("train", "val") below a folder.

    Annotations: the one instances_SPLIT*.json in FOLDER/annotations or FOLDER. Images: FOLDER/SPLIT2017 where the file is
    instances_SPLIT2017.json, the same below FOLDER/images, FOLDER/images/{training,validation}, FOLDER/images or FOLDER: the first that
    holds an image that is listed.
    Raises ValueError that tells what was looked for.
    """
    folder = Path(folder)
    found = sorted({*folder.glob(f"annotations/instances_{split}*.json"), *folder.glob(f"instances_{split}*.json")})
    if len(found) != 1:
        there = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"{folder} should hold one annotations/instances_{split}*.json, as instances_{split}2017.json; there is: {there}")
    inner = found[0].stem.removeprefix("instances_")
    names = [str(image["file_name"]) for image in _read(found[0])["images"][:100]]
    as_in_ade20k = {"train": "training", "val": "validation"}.get(split, split)
    places = [folder / inner, *(folder / "images" / name for name in (inner, as_in_ade20k, "")), folder]
    for place in places:
        if files_in(place, names):
            return found[0], place
    raise ValueError(f"no image that {found[0]} lists first is in {', '.join(map(str, places))}; put its images into the first of these")


def read_coco(annotations: Path, images: Path, *, masks: bool) -> InstanceSet:
    """The set in an annotation file, without the images that are not there and the instances that are none.

    masks: keep them; an instance without a usable one is then left out. Category numbers may have gaps; labels are 1..K in their order.
    Raises ValueError for a file that is none of COCO's instances, and where nothing is left.
    """
    content = _read(annotations)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    label_of = {category["id"]: label for label, category in enumerate(categories, 1)}
    if len(label_of) < len(categories):
        raise ValueError(f"{annotations}: a category id stands twice")
    tally = Tally()
    there = files_in(images, [image["file_name"] for image in content["images"]])
    listed = []
    for image in content["images"]:
        if image["file_name"] in there:
            listed.append(image)
        else:
            tally.add("images that are not there", image["file_name"])
    if not listed:
        raise ValueError(f"none of the {len(content['images'])} images of {annotations} is in {images}")
    row_of = {image["id"]: row for row, image in enumerate(listed)}
    if len(row_of) < len(listed):
        raise ValueError(f"{annotations}: an image id stands twice")
    kept: list[tuple[int, dict[str, Any]]] = []
    for annotation in content["annotations"]:
        if annotation["category_id"] not in label_of:
            raise ValueError(
                f"{annotations}: annotation {annotation['id']} has category_id {annotation['category_id']}, which no category has"
            )
        row = row_of.get(annotation["image_id"])
        if row is None:
            tally.add(_NOT_THERE, f"annotation {annotation['id']}")
        elif reason := _fault(annotation, listed[row], masks):
            tally.add(reason, f"annotation {annotation['id']} of {listed[row]['file_name']}")
        else:
            kept.append((row, annotation))
    kept.sort(key=lambda pair: pair[0])
    rows = np.array([row for row, _ in kept], np.int64)
    return InstanceSet(
        source=str(annotations),
        folder=images,
        files=tuple(image["file_name"] for image in listed),
        ids=np.array([image["id"] for image in listed], np.int64),
        sizes=np.array([(image["height"], image["width"]) for image in listed], np.int32),
        first=np.searchsorted(rows, np.arange(len(listed) + 1)),
        boxes=np.array([a["bbox"] for _, a in kept], np.float64).reshape(-1, 4),
        labels=np.array([label_of[a["category_id"]] for _, a in kept], np.int64),
        areas=np.array([a.get("area", a["bbox"][2] * a["bbox"][3]) for _, a in kept], np.float64),
        ignored=np.array([bool(a.get("iscrowd", 0)) for _, a in kept], bool),
        train_ignored=False,
        masks=InstanceMasks([a["segmentation"] for _, a in kept]) if masks else None,
        classes=tuple(str(category["name"]) for category in categories),
        category_ids=tuple(label_of),
        fingerprint=hashlib.sha256(annotations.read_bytes()).hexdigest()[:16],
        left_out=tally.cases,
    )


def _read(annotations: Path) -> dict[str, Any]:
    try:
        content = json.loads(annotations.read_bytes())
        missing = ", ".join(sorted(_KEYS.keys() - content.keys()))
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"cannot read {annotations}: {error}") from error
    if missing:
        raise ValueError(f"{annotations} is no file of COCO's instances: it has no {missing}")
    for kind, keys in _KEYS.items():
        for number, entry in enumerate(content[kind]):
            if not keys <= entry.keys():
                lacking = ", ".join(sorted(keys - entry.keys()))
                raise ValueError(f"{annotations}: number {number} of its {kind} lacks {lacking}; are these the annotations of instances?")
    return content


def _fault(annotation: dict[str, Any], image: dict[str, Any], masks: bool) -> str | None:
    """Why an instance cannot be used, or None."""
    x, y, width, height = annotation["bbox"]
    seen = min(x + width, image["width"]) - max(x, 0), min(y + height, image["height"]) - max(y, 0)
    if width <= 0 or height <= 0:
        return "boxes without area"
    if min(seen) <= 0:
        return "boxes outside of their image"
    if not masks:
        return None
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return "instances without a mask"
    if isinstance(segmentation, list):  # drawn when it is asked for: that takes a thousand times longer than this
        return None if any(len(polygon) >= 6 for polygon in segmentation) else "instances without a mask"
    size, counts = segmentation.get("size"), segmentation.get("counts")
    right_sum = not isinstance(counts, list) or sum(counts) == image["height"] * image["width"]
    return None if size == [image["height"], image["width"]] and right_sum else "masks of another size than their image"
