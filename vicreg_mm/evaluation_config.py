"""What an evaluation program is told: one frozen dataclass each, which a recipe fills and the command line overrides. Imports no torch."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from vicreg_mm.config import BUILTIN_DIGITS, ConfigError


@dataclass(frozen=True)
class EvaluationProgram:
    """What every program takes. A subclass names its sets and says what they are in the smoke profile."""

    name: ClassVar[str]
    """The recipe's name, and that of the rows it writes."""
    sets: ClassVar[tuple[str, ...]]
    """The options that name shards."""
    in_miniature: ClassVar[dict[str, Any]]
    """What the smoke profile sets."""
    miniature_data: ClassVar[str] = "the built-in digits"
    """What these sets are, for people."""

    encoder: str = ""
    """What to evaluate: a run directory, or another source that the program knows; empty: the smoke profile."""
    batch: int = 256
    """Images that a rank encodes at once."""
    workers: int = 8
    """Loader processes per rank; their number changes nothing but speed."""
    cache: str = ""
    """Folder for copies of remote shards; empty: a per-user cache."""
    cache_gib: float = 50.0
    """Bound of that folder in GiB."""
    out: str = ""
    """Folder of the result; empty: `evaluations` in the run directory, runs/evaluations for an encoder that is no run."""
    smoke: bool = False
    """The smoke profile: the same code path on the built-in digits, with an encoder that is trained for it where none is given."""
    smoke_steps: int = 60
    """Length of that training."""

    def miniature(self) -> Self:
        """The smoke profile."""
        return dataclasses.replace(self, smoke=True, workers=min(self.workers, 1), **self.in_miniature)

    def check(self) -> None:
        """Raise ConfigError for values that no evaluation can have."""
        for name in ("batch", "smoke_steps", "cache_gib"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.workers < 0:
            raise ConfigError(f"workers is {self.workers}; it cannot be negative")


@dataclass(frozen=True)
class RetrievalProgram(EvaluationProgram):
    """Search captions with images and images with captions."""

    name = "retrieval"
    sets = ("shards",)
    in_miniature: ClassVar[dict[str, Any]] = {"shards": BUILTIN_DIGITS + ":test"}

    weights: str = ""
    """Of --encoder open_clip/NAME: a tag or file that open_clip knows, or "random"."""
    shards: str = ""
    """Folder (or http(s) URL) of indexed shards with captions, in the protocol's order; "builtin:digits:test" for the built-in scans."""
    output: Literal["expander", "encoder"] = "expander"
    """What to compare: what the expanders (or the objective's own projections) give, or the encoders, through their common projection."""
    centre: bool = False
    """Subtract each modality's mean first, for embeddings trained without negatives."""
    folds: int = 0
    """Beside the whole set, the mean over this many folds of it; 0: none."""
    fold_size: int = 1000
    """Images in a fold."""

    def check(self) -> None:
        """Raise ConfigError for folds that cannot be, too."""
        super().check()
        if self.folds < 0:
            raise ConfigError(f"folds is {self.folds}; it cannot be negative")
        if self.fold_size < 1:
            raise ConfigError(f"fold_size is {self.fold_size}; it must be positive")
        if not self.folds and self.fold_size != RetrievalProgram.fold_size:
            raise ConfigError(f"fold_size {self.fold_size} has no effect: folds is 0; give --folds")


@dataclass(frozen=True)
class ZeroShotProgram(EvaluationProgram):
    """Classify images by the texts of their classes."""

    name = "zero_shot"
    sets = ("shards",)
    in_miniature: ClassVar[dict[str, Any]] = {"shards": BUILTIN_DIGITS + ":test", "class_names": "", "templates": BUILTIN_DIGITS}

    weights: str = ""
    """Of --encoder open_clip/NAME: a tag or file that open_clip knows, or "random"."""
    shards: str = ""
    """Folder (or http(s) URL) of indexed shards with labels; "builtin:digits:test" for the built-in scans."""
    output: Literal["expander", "encoder"] = "expander"
    """What to compare: what the expanders (or the objective's own projections) give, or the encoders, through their common projection."""
    centre: bool = False
    """Subtract the mean of the images and that of the classes first, for embeddings trained without negatives."""
    class_names: str = ""
    """"imagenet", or a file of names in the order of the labels (one a line, or a JSON list); empty: classes.json of the shards."""
    underscores_to_spaces: bool = False
    """Read great_white_shark in that file as great white shark."""
    templates: str = "imagenet"
    """Prompts: imagenet (80), simple (7), builtin:digits, or a file with {} in every line."""
