"""What a record says: image bytes, label and captions from the fields of one sample, however its shard was read."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vicreg_mm.input.shard_scan import IMAGE_FIELDS


class RecordError(ValueError):
    """One bad record; names shard, row and field. The loaders leave it out and count it."""


@dataclass(frozen=True)
class Sample:
    """One record, undecoded. image is None only in a set without any images, label None where the record has none."""

    row: int
    shard: int
    row_in_shard: int
    image: bytes | None
    label: int | None
    captions: tuple[str, ...]


def parse_record(members: Mapping[str, bytes], where: str) -> tuple[bytes | None, int | None, tuple[str, ...]]:
    """Image, label and captions from a record's fields; raises RecordError for a label, caption or JSON that cannot be understood.

    The label is that of `cls`, else "label" of `json`; captions are `txt`, then "captions" or "caption" of `json`, each once.
    """
    image = next((members[field] for field in IMAGE_FIELDS if field in members), None)
    label, captions = None, []
    try:
        field = "cls"
        if field in members:
            label = _label(members[field].decode("ascii").strip())
        field = "txt"
        if field in members:
            captions.append(members[field].decode("utf-8").strip())
        field = "json"
        if field in members:
            content = json.loads(members[field])
            if not isinstance(content, dict):
                raise ValueError("not an object")
            if label is None and content.get("label") is not None:
                label = _label(content["label"])
            captions += _captions(content)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{where}: bad {field} ({error})") from None
    return image, label, tuple(dict.fromkeys(caption for caption in captions if caption))


def _label(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch("[0-9]{1,18}", value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63:
        return value
    raise ValueError(f"label {str(value)[:40]!r} is not an integer from 0")


def _captions(content: dict[str, Any]) -> list[str]:
    found = content["captions"] if content.get("captions") is not None else content.get("caption")
    if found is None:
        return []
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(caption, str) for caption in found):
        raise ValueError("captions are not strings")
    return [caption.strip() for caption in found]
