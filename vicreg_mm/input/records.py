"""What a record says: image bytes, label and captions from the fields of one sample, however its shard was read."""

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vicreg_mm.input.shard_scan import IMAGE_FIELDS

MAX_CAPTION = 10_000  # characters (assumed: a hundred times what a text encoder's context holds)

_SPACES = re.compile("\r\n|[\t-\r\x1c-\x1f\x85]")
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ENDS = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\ufeff"  # every white space of Unicode, and the byte order mark
_INVISIBLE_CATEGORIES = {"Zs", "Zl", "Zp", "Cc", "Cf"}
# letters, marks and symbols that show nothing: fillers, Braille blank, variation selectors
_INVISIBLE = {*map(chr, (0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0)), *map(chr, range(0x180B, 0x1810))}
_INVISIBLE |= {*map(chr, range(0xFE00, 0xFE10)), *map(chr, range(0xE0100, 0xE01F0))}


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

    The label is that of `cls`, else "label" of `json`; captions are `txt`, then "captions" or "caption" of `json`, as `clean_caption`
    leaves them, each once and none empty (img2dataset writes one caption into both).
    """
    image = next((members[field] for field in IMAGE_FIELDS if field in members), None)
    label, captions = None, []
    try:
        field = "cls"
        if field in members:
            label = _label(members[field].decode("ascii").strip())
        field = "txt"
        if field in members:
            captions.append(clean_caption(members[field].decode("utf-8")))
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
    return [clean_caption(caption) for caption in found]


def clean_caption(text: str, max_characters: int = MAX_CAPTION) -> str:
    """A caption as encoders get it: on one line, without control characters, cut at `max_characters`; "" if nothing in it is visible.

    Line ends, tabs and the other control characters that are white space (C0 and C1) become one space each, NUL and the rest of them go.
    White space at the ends goes, with a byte order mark; inside it stays as it is. What has only white space, zero-width and filler
    characters is empty. Cleaning twice is cleaning once.
    Raises ValueError for text that is no Unicode: half of a surrogate pair, which is also how a byte that is no UTF-8 is read.
    """
    if not text.isprintable():
        if bad := _SURROGATE.search(text):
            code = ord(bad[0])
            what = f"byte 0x{code - 0xDC00:02x} is not UTF-8" if 0xDC80 <= code <= 0xDCFF else f"half a surrogate pair, U+{code:04X}"
            raise ValueError(f"{what}, at character {bad.start()}")
        text = _CONTROLS.sub("", _SPACES.sub(" ", text))
    text = text.strip(_ENDS)[:max_characters].rstrip(_ENDS)
    return text if any(_visible(character) for character in text) else ""


def _visible(character: str) -> bool:
    return unicodedata.category(character) not in _INVISIBLE_CATEGORIES and character not in _INVISIBLE
