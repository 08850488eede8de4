"""What the recipes of detection call: train a detector on an encoder, evaluate it, draw what it finds, keep the row."""

import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vicreg_mm import distributed
from vicreg_mm.evaluate import Measured, run_evaluation
from vicreg_mm.transfer.detection_config import DetectionConfig

HEADLINE = ("AP", "AP50", "AP75")
DRAWINGS, FOUND = "drawings", "detections.json"


def detection(recipe: DetectionConfig, arguments: list[str] | None = None) -> None:
    """Train and evaluate a detector with the command line's overrides. What a user can mend ends in one line and exit code 2."""
    run_evaluation(recipe, None, measure_detection, arguments)


def measure_detection(config: DetectionConfig, device: torch.device) -> Measured:
    """Train as the configuration says, from the start or from the last checkpoint, and measure average precision on the other set."""
    from vicreg_mm.training_run import train_task
    from vicreg_mm.transfer.detection_data import evaluation_data, open_sets, training_data
    from vicreg_mm.transfer.detection_evaluation import detection_table, evaluate, write_detections

    train, test = open_sets(config)
    if distributed.is_main():
        print(train.report(), test.report(), sep="\n", flush=True)
    rules = config.data_format

    def probe(module: nn.Module) -> dict[str, float]:
        return {f"eval/{name}": value for name, value in evaluate(module, test, evaluation_data(test, config), device, rules)[0].items()}  # type: ignore[arg-type]

    run, detector = train_task(
        config, training_data(train, config), functools.partial(build, config, len(train.classes), device), device, probes=(probe,),
        probe_every=config.eval_every_epochs, max_bad_share=config.max_bad_share, option=f"--data {config.data}",
        title=f"{config.detector} on {config.encoder}, {len(train.classes)} classes",
    )  # fmt: skip
    result, found = evaluate(detector, test, evaluation_data(test, config), device, rules)  # type: ignore[arg-type]
    if found is not None:
        write_detections(run / FOUND, test, found)
        _draw(run, test, found, config.draw)
    data = {"data": {"path": config.data, "edition": f"{train.fingerprint}-{test.fingerprint}", "num_samples": len(test)}}
    kinds = [kind for kind in ("box", "mask") if f"{kind}/AP" in result]
    told = {name: value if math.isfinite(value) else None for name, value in result.items()}
    headline = {f"{kind}/{name}": f"{kind} {name}, %" for kind in kinds for name in HEADLINE if told[f"{kind}/{name}"] is not None}
    table = f"{config.name}: {config.encoder}, {result['num_images']} images of {test.source}\n{detection_table(result)}"
    return Measured({"source": config.encoder}, data, told, table, headline, run)


def build(config: DetectionConfig, num_classes: int, device: torch.device) -> nn.Module:
    """The detector with the encoder's weights, BatchNorms in their mode."""
    from vicreg_mm.batchnorm import convert_sync_batchnorm, set_batchnorm
    from vicreg_mm.encoder_file import open_encoder
    from vicreg_mm.encoders.windows import attend_in_windows
    from vicreg_mm.transfer.detection import build_detector

    encoder = open_encoder(config.encoder, allow=config.allow, resample=config.resample, drop_path=config.drop_path)
    if config.window:
        attend_in_windows(encoder, config.window)
    if config.batchnorm == "frozen":
        set_batchnorm(encoder, "frozen", device)
    detector = build_detector(encoder, num_classes, config)
    if config.batchnorm != "train" and distributed.world_size() > 1:
        convert_sync_batchnorm(detector, device)
    if config.engine.activation_checkpointing:
        encoder.set_activation_checkpointing()
    return detector.train()


def _draw(run: Path, images: Any, found: list[Any], count: int) -> None:
    from vicreg_mm.transfer.detection_sheet import sheet

    for n in range(min(count, len(found))):  # evenly over the set
        one = found[n * len(found) // min(count, len(found))]
        path = run / DRAWINGS / f"{Path(images.files[one.row]).stem}.png"
        path.parent.mkdir(exist_ok=True)
        sheet(images, one).save(path)
