"""One run is one frozen `RunConfig`: a recipe writes it, the command line overrides it, the run directory keeps it as JSON.

Imports no torch: a wrong option must be reported before anything slow is loaded.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

Part = TypeVar("Part")
BUILTIN_DIGITS = "builtin:digits"
RANDOM = "random"


class ConfigError(ValueError):
    """A setting that cannot be: one line that names it, its value and what would do."""


@dataclass(frozen=True)
class InputConfig:
    """Where the images come from and how they become views."""

    shards: str = ""
    """Folder (or http(s) URL) of indexed shards; "builtin:digits" for the built-in scans; empty: the smoke profile."""
    mode: Literal["planned", "resampled"] = "planned"
    """planned: exact order, exact resume. resampled: webdataset's sampling with replacement, for shards that can only be streamed."""
    steps_per_epoch: int = 0
    """Length of an epoch in steps, for `resampled` only."""
    views: str = "document"
    """Augmentation preset: document, official, paper, dino, crop, cifar, digits."""
    image_size: int = 224
    """Side of a global view in pixels."""
    global_scale: tuple[float, float] | None = None
    """Share of the image's area that a global view shows, from and to; None: the preset's."""
    local_size: int = 96
    """Side of a local view in pixels."""
    local_scale: tuple[float, float] | None = None
    """Share of the image's area that a local view shows, from and to; None: the preset's."""
    slots: int = 64
    """The data sequence is cut into at most this many parts; a batch draws equally from each."""
    workers: int = 8
    """Loader processes per rank; their number changes nothing but speed."""
    cache: str = ""
    """Folder for copies of remote shards; empty: a per-user cache."""
    cache_gib: float = 50.0
    """Bound of that folder in GiB."""
    max_bad_share: float = 0.01
    """Stop when more than this share of the records tried could not be used."""


@dataclass(frozen=True)
class EncoderConfig:
    """The network whose features are wanted."""

    name: str = "torchvision/resnet50"
    """torchvision/NAME, timm/NAME, open_clip/NAME, or your own: package.module:function."""
    weights: str = ""
    """What it starts from: a run directory, a file, library (or library:TAG) for the library's own weights; empty or random: nothing."""
    weights_allow: tuple[str, ...] = ()
    """Names of layers in which those weights may lack something or have too much; a library's classifier needs no mention."""
    weights_resample: bool = False
    """Resample the position embeddings of those weights, where they are for images or patches of another size."""
    frozen: bool = False
    """Keep it as it is: evaluation mode, no gradient."""
    mean: tuple[float, float, float] | None = None
    """Mean of the pixels in [0, 1], red, green and blue, that it expects; None: that of the weights, else the library's."""
    std: tuple[float, float, float] | None = None
    """Their standard deviation, likewise."""
    pooling: Literal["token", "avg"] | None = None
    """Transformers: class token or mean of the patches; None: the network's own."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """ResNets: cifar is a 3 x 3 first convolution without max-pool, for images of 32 px."""
    patch_size: int | None = None
    """Transformers: side of a patch in pixels; None: the network's own."""
    layer_scale: float = 0.0
    """Transformers and ConvNeXt: where LayerScale starts; 0: the network's own (ConvNeXt has it at 1e-6, a plain ViT has none)."""
    zero_init_residual: bool | None = None
    """ResNets: start every residual block as the identity; None: the encoder's default (yes)."""
    drop_path: float = 0.0
    """Stochastic depth rate."""
    forward: Literal["auto", "per_view", "per_resolution"] = "auto"
    """One forward per view, or per resolution; auto: per view where there is BatchNorm, whose statistics a joint batch would change."""


@dataclass(frozen=True)
class TextConfig:
    """Captions and their encoder, for objectives that take texts."""

    tokenizer: str = ""
    """"open_clip", a sentencepiece .model, or a folder that holds tokenizer.model; empty: the shards' folder."""
    views: str = "default"
    """Augmentation preset: none, eda, default, long."""
    synonyms: str = ""
    """File of synonyms, for presets that replace words."""
    context: int = 32
    """Tokens in a text, start and end included; longer ones are cut."""
    encoder: Literal["transformer", "gru"] = "transformer"
    """transformer: open_clip's; gru: word embeddings of 300 and a GRU, as VSE++."""
    width: int = 512
    """Width of its features."""
    depth: int = 12
    """Layers; 1 for gru."""
    heads: int = 8
    """Attention heads; 1 for gru."""
    weights: str = ""
    """What it starts from: a run directory, an open_clip folder or file, open_clip/NAME@library:TAG; empty or random: random weights."""
    frozen: bool = False
    """Keep it as it is: evaluation mode, no gradient."""


@dataclass(frozen=True)
class ExpanderConfig:
    """The projector from features to embeddings, thrown away after pretraining."""

    widths: tuple[int, ...] = (8192, 8192, 8192)
    """Output width of every layer."""
    projection: int = 0
    """A linear layer before it, from images' and texts' features to this width, in which they can be compared and exported; 0: none."""
    final: Literal["linear", "bn_relu"] = "linear"
    """linear: no bias and nothing after it (paper, official code); bn_relu: BatchNorm and ReLU after it too (reference document)."""
    norm: Literal["batch", "layer"] = "batch"
    """Normalisation inside the expander."""
    weights: str = ""
    """A run directory from which all that stands behind the encoders starts: projections, expanders, objective; empty: random weights."""
    forward: Literal["per_view", "per_resolution"] = "per_view"
    """What BatchNorm normalises over: one view, or all views of one resolution together."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised."""

    name: str = "vicreg"
    """A registered objective, or a sum "a+b"; `vicreg-mm objectives` lists them. Another than the recipe's starts without its options."""
    options: dict[str, float | int | bool | str] = field(default_factory=dict)
    """Options of the objective: --objective.options.NAME VALUE."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule. 1-d and 0-d parameters are never decayed."""

    name: Literal["adamw", "lars", "sgd"] = "adamw"
    """lars needs ZeRO stage 0."""
    lr: float = 2e-3
    """Peak learning rate at a global batch of `lr_batch`; scaled linearly with the batch."""
    lr_batch: int = 2048
    """The global batch that `lr` is meant for."""
    max_lr: float = 0.0
    """The scaled peak is at most this; 0: no bound."""
    layer_decay: float = 1.0
    """Each layer of either encoder learns at this multiple of the rate of the layer after it; the expander at the full rate."""
    patch_lr_scale: float = 1.0
    """The patch embedding of a transformer, the stem of a ConvNeXt, learns at this multiple of its layer's rate."""
    weight_decay: float = 0.04
    """Decay of parameters with at least two dimensions."""
    final_weight_decay: float | None = None
    """Where a cosine over the whole run takes the decay; None: it stays."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW only."""
    momentum: float = 0.9
    """LARS and SGD only."""
    warmup_epochs: float = 10.0
    """Linear warm-up, per step."""
    final_lr_ratio: float = 0.0
    """The cosine ends at this share of the peak."""
    clip: float = 0.0
    """Largest gradient norm; 0: no clipping."""


@dataclass(frozen=True)
class EngineConfig:
    """How DeepSpeed runs it."""

    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """bf16 and fp16 are autocast: weights, statistics and the loss stay float32."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed partitions over the ranks: 1 optimizer states, 2 and gradients, 3 and parameters."""
    activation_checkpointing: bool = False
    """Recompute the encoder's activations in the backward pass."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved, and what is kept."""

    every_epochs: float = 1.0
    """Save after this many epochs; 0: only by steps."""
    every_steps: int = 0
    """Save after this many steps; 0: only by epochs."""
    keep: int = 2
    """The last so many are kept."""
    milestone_epochs: int = 100
    """Multiples of this many epochs are kept for good; 0: none."""


@dataclass(frozen=True)
class MonitorConfig:
    """What is written down."""

    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    gauge_every: int = 500
    """Steps between two measurements of the features' effective rank."""


@dataclass(frozen=True)
class EvaluationConfig:
    """The tables at the end: kNN and linear probes of raw pixels, a random and the pretrained encoder; of image-text runs, retrieval and
    zero-shot classification, too."""

    train: str = ""
    """Indexed, labelled shards to fit kNN and probes on; empty: no such table."""
    test: str = ""
    """Indexed shards that are held out: with labels for kNN, probes and zero-shot, with captions for retrieval, which needs no `train`."""
    limit: int = 0
    """Use at most this many training images; 0: all."""
    every_epochs: float = 0.0
    """Measure kNN, and of image-text runs retrieval and zero-shot, during training, too, after this many epochs; 0: at the end alone."""
    class_names: str = ""
    """Zero-shot classification of `test`: "imagenet", or a file of names in the order of the labels; empty: classes.json of the shards."""
    templates: str = "simple"
    """Prompts: imagenet, simple, builtin:digits, or a file with {} in every line."""


@dataclass(frozen=True)
class RunConfig:
    """A complete run."""

    name: str
    """The recipe's name: the run directory is runs/NAME-NNN unless `run` is given."""
    input: InputConfig = InputConfig()
    encoder: EncoderConfig = EncoderConfig()
    text: TextConfig = TextConfig()
    expander: ExpanderConfig = ExpanderConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    num_local: int = 0
    """Local views of every image beside the two global ones, for objectives that take them (multicrop)."""
    batch: int = 2048
    """Global batch: the sum over all ranks."""
    epochs: int = 100
    """Passes over the data."""
    steps: int = 0
    """Stop the schedule after this many steps instead of `epochs`; 0: by epochs."""
    seed: int = 0
    """Of the weights, the data order and the views."""
    run: str = ""
    """The run directory; empty: the next free runs/NAME-NNN."""
    resume: bool = False
    """Go on with `run`, or with the newest run of this recipe."""
    smoke_steps: int = 40
    """Length of the smoke profile."""
    smoke: bool = False
    """The smoke profile: the same code path with a toy encoder on the built-in digits, for a few dozen steps."""
    deepspeed_config: str = ""
    """A DeepSpeed JSON file whose settings are merged over ours."""

    @property
    def peak_lr(self) -> float:
        """The peak learning rate at this run's batch."""
        return min(self.optim.lr * self.batch / self.optim.lr_batch, self.optim.max_lr or math.inf)


POSITIVE = (
    "batch", "epochs", "smoke_steps", "optim.lr", "optim.lr_batch", "input.image_size", "input.local_size", "input.slots",
    "input.cache_gib", "monitor.log_every", "monitor.gauge_every", "checkpoint.keep",
)  # fmt: skip
NOT_NEGATIVE = (
    "steps", "num_local", "expander.projection",
    "optim.max_lr", "optim.weight_decay", "optim.momentum", "optim.warmup_epochs", "optim.clip", "input.workers",
    "input.steps_per_epoch", "encoder.layer_scale",
    "checkpoint.every_epochs", "checkpoint.every_steps", "checkpoint.milestone_epochs", "evaluation.limit",
    "evaluation.every_epochs",
)  # fmt: skip


def check(config: RunConfig) -> None:
    """Raise ConfigError for values that no run can have."""
    flat = to_flat(config)
    for name in POSITIVE:
        if not 0 < flat[name] < math.inf:
            raise ConfigError(f"{name} is {flat[name]}; it must be positive")
    for name in NOT_NEGATIVE:
        if not 0 <= flat[name] < math.inf:
            raise ConfigError(f"{name} is {flat[name]}; it cannot be negative")
    if not 0 <= config.seed < 2**32:
        raise ConfigError(f"seed is {config.seed}; it must be from 0 to 2^32 - 1")
    if config.batch < 2:
        raise ConfigError(f"batch is {config.batch}; the variance over a batch needs at least 2 samples")
    if not 0 <= config.optim.final_lr_ratio <= 1:
        raise ConfigError(f"optim.final_lr_ratio is {config.optim.final_lr_ratio}; it is a share of the peak, from 0 to 1")
    if config.optim.final_weight_decay is not None and not 0 <= config.optim.final_weight_decay < math.inf:
        raise ConfigError(f"optim.final_weight_decay is {config.optim.final_weight_decay}; it cannot be negative")
    for name in ("optim.layer_decay", "optim.patch_lr_scale"):
        if not 0 < flat[name] <= 1:
            raise ConfigError(f"{name} is {flat[name]}; it is a factor above 0 and at most 1")
    if not 0 <= config.input.max_bad_share <= 1:
        raise ConfigError(f"input.max_bad_share is {config.input.max_bad_share}; it is a share, from 0 to 1")
    if config.optim.name == "lars" and config.engine.zero_stage > 0:
        raise ConfigError(
            f"optim.name lars with engine.zero_stage {config.engine.zero_stage}: ZeRO flattens the parameters and LARS would lose the "
            "norm of each layer; use --engine.zero_stage 0 or --optim.name adamw"
        )
    if config.engine.precision == "fp16" and config.engine.zero_stage > 0:
        raise ConfigError(
            f"engine.precision fp16 with engine.zero_stage {config.engine.zero_stage}: DeepSpeed's autocast would keep a loss scale "
            "of its own on every rank; use --engine.precision bf16 or --engine.zero_stage 0"
        )
    if config.input.mode == "resampled" and config.input.steps_per_epoch <= 0:
        raise ConfigError("input.mode resampled has no end of its own: give --input.steps_per_epoch")
    if config.input.mode == "planned" and config.input.steps_per_epoch:
        raise ConfigError("input.steps_per_epoch has no effect with input.mode planned: the data set's size decides")
    if not all(0 <= beta < 1 for beta in config.optim.betas):
        raise ConfigError(f"optim.betas is {config.optim.betas}; both must be from 0 to below 1")
    if config.num_local and config.input.local_size > config.input.image_size:
        raise ConfigError(
            f"input.local_size {config.input.local_size} is larger than input.image_size {config.input.image_size}: "
            "local views are the small ones"
        )
    _check_weights(config)
    _check_effects(config)
    if config.evaluation.train and not config.evaluation.test:
        raise ConfigError("evaluation.train and evaluation.test go together: one of them is empty")


def is_given(weights: str) -> bool:
    """Whether a tower starts from weights that are read from somewhere."""
    return weights not in ("", RANDOM)


def _check_weights(config: RunConfig) -> None:
    """Raise ConfigError for a tower that would keep its random weights, and for a normalisation that is none."""
    for tower, part, own in (("encoder", config.encoder, ":" in config.encoder.name), ("text", config.text, False)):
        if part.frozen and not part.weights and not own:  # an encoder of one's own may come with weights
            raise ConfigError(
                f"{tower}.frozen would keep random weights for good: give --{tower}.weights ({RANDOM}, if they are meant), or "
                f"--{tower}.no-frozen"
            )
    for name in ("mean", "std"):
        values = getattr(config.encoder, name)
        if values is not None and not all(math.isfinite(v) and (name == "mean" or v > 0) for v in values):
            raise ConfigError(f"encoder.{name} is {values}; it is of pixels in [0, 1]" + ("" if name == "mean" else ", above 0"))


def _check_effects(config: RunConfig) -> None:
    """Raise ConfigError for a setting that another one leaves without effect."""
    unused = {
        "optim.betas": config.optim.name != "adamw" and f"optim.name {config.optim.name} has none",
        "optim.momentum": config.optim.name == "adamw" and "optim.name adamw has betas",
        "encoder.weights_allow": not is_given(config.encoder.weights) and "encoder.weights names none",
        "encoder.weights_resample": not is_given(config.encoder.weights) and "encoder.weights names none",
        "encoder.zero_init_residual": is_given(config.encoder.weights) and "encoder.weights says how every layer starts",
        "encoder.drop_path": config.encoder.frozen and "encoder.frozen drops nothing",
        "optim.patch_lr_scale": config.encoder.frozen and "encoder.frozen learns nothing",
        "input.slots": config.input.mode == "resampled" and "input.mode resampled has no slots",
        "input.cache": config.input.mode == "resampled" and "input.mode resampled keeps no copies",
        "evaluation.limit": not config.evaluation.train and "evaluation.train is empty",
        "evaluation.every_epochs": not config.evaluation.test and "evaluation.test is empty",
        "evaluation.class_names": not config.evaluation.test and "evaluation.test is empty",
    }
    flat, default = to_flat(config), to_flat(RunConfig(name=""))
    for name, reason in unused.items():
        if reason and flat[name] != default[name]:
            raise ConfigError(f"{name} {flat[name]} has no effect: {reason}; leave it out")


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain nested data, as it stands in config.json."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_flat(config: RunConfig) -> dict[str, Any]:
    """Dotted names to values; the objective's options apart."""
    flat: dict[str, Any] = {}
    for key, value in to_dict(config).items():
        if isinstance(value, dict):
            flat.update({f"{key}.{inner}": content for inner, content in value.items()})
        else:
            flat[key] = value
    return flat


def from_dict(data: dict[str, Any]) -> RunConfig:
    """The inverse of `to_dict`; raises ConfigError for a key that no RunConfig has."""
    values: dict[str, Any] = {}
    for outer in dataclasses.fields(RunConfig):
        if outer.name not in data:
            continue
        value = data[outer.name]
        if dataclasses.is_dataclass(outer.type):
            value = part_from_dict(outer.type, outer.name, value)  # type: ignore[arg-type]
        values[outer.name] = value
    extra = sorted(set(data) - {outer.name for outer in dataclasses.fields(RunConfig)})
    if extra:
        raise ConfigError(
            f"unknown configuration key {extra[0]}; known: {', '.join(outer.name for outer in dataclasses.fields(RunConfig))}"
        )
    return RunConfig(**values)


def part_from_dict(part: type[Part], name: str, data: dict[str, Any]) -> Part:
    """One part of a RunConfig, as EncoderConfig, out of plain data; raises ConfigError for a key that it has not."""
    known = {inner.name for inner in dataclasses.fields(part)}  # type: ignore[arg-type]
    extra = sorted(set(data) - known)
    if extra:
        raise ConfigError(f"unknown configuration key {name}.{extra[0]}; known: {', '.join(sorted(known))}")
    return part(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})


def save(config: RunConfig, path: Path) -> None:
    """Write the configuration as JSON."""
    path.write_text(json.dumps(to_dict(config), indent=2) + "\n")


def load(path: Path) -> RunConfig:
    """Read a configuration that `save` wrote."""
    try:
        return from_dict(json.loads(path.read_text()))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


FREE_TO_CHANGE = (
    "run", "resume", "deepspeed_config", "input.workers", "input.cache", "input.shards", "input.max_bad_share", "text.tokenizer",
    "engine.zero_stage", "engine.activation_checkpointing", "checkpoint.", "monitor.", "evaluation.",
)  # fmt: skip
"""What a resumed run may set anew: none of it moves the loss (shards and tokenizer may have moved; the checkpoint compares contents)."""


def differences(before: RunConfig, now: RunConfig) -> list[str]:
    """`name: before -> now` for every setting that a resumed run may not change.

    encoder.mean and encoder.std may be None now: then they are those that the run began with, which it took from its weights.
    """
    old, new = to_flat(before), to_flat(now)
    new |= {key: old[key] for key in ("encoder.mean", "encoder.std") if new[key] is None}
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in sorted(old | new)
        if old.get(key) != new.get(key) and not key.startswith(FREE_TO_CHANGE)
    ]  # fmt: skip
