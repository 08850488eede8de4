"""Turn a folder of images into indexed webdataset shards, shuffled with a seed.

    python data/image_folder.py SOURCE OUT

SOURCE: class folders (labels count them in the order of their names, as torchvision's ImageFolder), or images in one flat folder
(no labels). Of a set with split folders pass one split at a time.
OUT gets shard-*.tar, index.json, index.npy, classes.json, bad.json and source.json; data/README.md says what they hold.
An interrupted run is continued by the same command.
"""

from vicreg_mm.input.listing import list_folder
from vicreg_mm.input.writing import parser, write_from_command_line


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__).parse_args(arguments)
    return write_from_command_line(lambda: list_folder(options.source), options)


if __name__ == "__main__":
    raise SystemExit(main())
