"""One JSON file for every evaluation that was made: the row of a table, with all that is needed to make it again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "evaluations"
KEYS = ("evaluation", "encoder", "data", "options", "result")


def folder_of(encoder: str, out: str = "") -> Path:
    """Where the rows of an encoder go: `out` if it is given, else `evaluations` in its run directory, else runs/evaluations."""
    if out:
        return Path(out)
    return (Path(encoder) if (Path(encoder) / "config.json").is_file() else Path("runs")) / FOLDER


def write_row(folder: Path, row: Mapping[str, Any]) -> Path:
    """Write a row as folder/EVALUATION-NNN.json, the next free number, and return its path.

    row: `evaluation`, its name; `encoder`, which one and what was taken from it; `data`, the sets by the option that named them, each
    with its `edition`; `options`, all of the program's; `result`, numbers by name or by row and name; and what else there is to tell.
    """
    assert all(key in row for key in KEYS)
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(row, indent=2) + "\n"
    numbers = [int(n) for path in folder.glob(f"{row['evaluation']}-*.json") if (n := path.stem.rpartition("-")[2]).isdecimal()]
    number = max(numbers, default=0) + 1
    while True:
        path = folder / f"{row['evaluation']}-{number:03d}.json"
        try:
            with path.open("x") as file:
                file.write(content)
            return path
        except FileExistsError:  # another program evaluates the same encoder
            number += 1


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All rows in a folder, by name and number."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*-*.json"))]
