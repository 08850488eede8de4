"""Save a run, go on with it, and take its encoder out.

A checkpoint is a folder `checkpoints/step-NNNNNNNN` of plain safetensors and JSON, whole or not there at all:
  model.safetensors      every parameter and buffer, float32, unpartitioned
  optimizer.safetensors  NAME/STATE for every state of every parameter (AdamW: exp_avg, exp_avg_sq, step)
  state.json             position in the data, step, configuration, data fingerprint, loss scale, and the loop's journal: the sums
                         of the epoch that is under way, counts of bad records, advice given
It belongs to no layout: saved at any ZeRO stage on any number of ranks, it goes on at any other. No pickle is read.
(DeepSpeed's own format is pickle and, from stage 1, bound to its number of ranks.) Random numbers need no state: they are drawn
anew from (seed, position) at every step.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vicreg_mm import config as configs
from vicreg_mm import distributed
from vicreg_mm.encoders import VisionEncoder, build_vision

STATE = ("step", "milestone", "data", "loss_scale", "journal")
"""What state.json must hold; the configuration, the position and the number of ranks are there for the reader."""
REMOVE = "; if it is damaged, remove its folder to go on from the checkpoint before it"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read: one line that names it and what would do."""


# Saving and loading the state of a DeepSpeed engine, whole --------------------------------------------------------------


def model_state(engine: Any) -> dict[str, Tensor]:
    """Every parameter and buffer, on the host of rank 0 (empty elsewhere). All ranks must call it."""
    if engine.zero_optimization_stage() < 3:
        return _to_host(engine.module.state_dict()) if distributed.is_main() else {}
    import deepspeed

    state: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():  # one at a time: never the whole model on the device
        with deepspeed.zero.GatheredParameters([parameter]):
            if distributed.is_main():
                state[name] = parameter.detach().cpu().clone()
    if distributed.is_main():
        persistent = set(engine.module.state_dict())
        state.update(_to_host({name: buffer for name, buffer in engine.module.named_buffers() if name in persistent}))
    return state


def optimizer_state(engine: Any) -> dict[str, Tensor]:
    """NAME/STATE -> whole tensor for every state of every trained parameter, on the host of rank 0. All ranks must call it."""
    state: dict[str, Tensor] = {}
    for name, parameter, kept in _whole_optimizer_state(engine):
        del parameter
        if distributed.is_main():
            state.update({f"{name}/{key}": value.detach().cpu().clone().contiguous() for key, value in kept.items()})
    return state


def restore_optimizer(engine: Any, path: Path) -> None:
    """Give the engine's fresh optimizer the states that `optimizer_state` saved, each rank its own part."""
    names = {id(p): name for name, p in engine.module.named_parameters()}
    with _opened(path) as saved:
        keys: dict[str, list[str]] = {}
        for entry in saved.keys():
            name, _, key = entry.rpartition("/")
            keys.setdefault(name, []).append(key)
        trained = {name for name, p in engine.module.named_parameters() if p.requires_grad}
        if keys and set(keys) != trained:
            differing = sorted(set(keys) ^ trained)
            raise CheckpointError(f"{path}: the optimizer's parameters are not those of this model; differing: {', '.join(differing[:8])}")
        if keys:
            _fill_optimizer(engine, names, keys, lambda name, key: saved.get_tensor(f"{name}/{key}"))


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}{REMOVE}") from error


def _base_optimizer(engine: Any) -> torch.optim.Optimizer:
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def _flat_groups(engine: Any) -> list[tuple[Tensor, list[Tensor]]]:
    """Stages 1 to 3: this rank's flat piece of every group, as the optimizer sees it, with the parameters that it is a piece of."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return list(zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True))
    return list(zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True))


def _own_piece(engine: Any, parameter: Tensor, flat: Tensor) -> tuple[slice, slice] | None:
    """Where this rank's piece of a parameter lies: (in the flattened parameter, in the rank's flat tensor); None if it has none."""
    if engine.zero_optimization_stage() == 3:
        _, start, length = engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)]
        first = length * distributed.rank()  # the last piece is padded: it may reach past the parameter's end
        inside = max(0, min(length, parameter.ds_numel - first))  # type: ignore[attr-defined]
        return (slice(first, first + inside), slice(start, start + inside)) if inside else None
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    whole, piece = mapping.lp_fragment_address, mapping.hp_fragment_address
    return slice(whole.start, whole.start + whole.numel), slice(piece.start, piece.start + piece.numel)


def _whole_optimizer_state(engine: Any) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
    names = {id(p): name for name, p in engine.module.named_parameters()}
    optimizer = _base_optimizer(engine)
    if engine.zero_optimization_stage() == 0:
        for group in optimizer.param_groups:
            for p in group["params"]:
                yield names[id(p)], p, {key: torch.as_tensor(value) for key, value in optimizer.state[p].items()}
        return
    for flat, parameters in _flat_groups(engine):
        for p in parameters:
            shape = p.ds_shape if hasattr(p, "ds_shape") else p.shape
            kept: dict[str, Tensor] = {}
            for key, value in optimizer.state[flat].items():
                if not isinstance(value, Tensor) or value.shape != flat.shape:
                    kept[key] = torch.as_tensor(value)
                    continue
                whole = torch.zeros(shape, dtype=value.dtype, device=value.device).flatten()
                own = _own_piece(engine, p, flat)
                if own is not None:
                    whole[own[0]] = value[own[1]]
                kept[key] = distributed.sum_over_ranks(whole).view(shape)  # exact: every element is one rank's, zero elsewhere
            yield names[id(p)], p, kept


def _fill_optimizer(engine: Any, names: Mapping[int, str], keys: Mapping[str, list[str]], read: Any) -> None:
    optimizer = _base_optimizer(engine)
    if engine.zero_optimization_stage() == 0:
        for group in optimizer.param_groups:
            for p in group["params"]:
                for key in keys[names[id(p)]]:
                    value = read(names[id(p)], key)
                    optimizer.state[p][key] = value.to(p.device) if value.ndim else value
        return
    for flat, parameters in _flat_groups(engine):
        state = optimizer.state[flat]
        for p in parameters:
            for key in keys[names[id(p)]]:
                value = read(names[id(p)], key)
                if value.ndim == 0:
                    state[key] = value
                    continue
                own = _own_piece(engine, p, flat)
                if key not in state:
                    state[key] = torch.zeros_like(flat)
                if own is not None:
                    state[key][own[1]] = value.flatten()[own[0]].to(flat.device)


def _to_host(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}


# The folder -------------------------------------------------------------------------------------------------------------


def save(folder: Path, engine: Any, state: Mapping[str, Any]) -> Path:
    """Write the checkpoint `folder` whole, or not at all. All ranks must call it; raises CheckpointError on every rank."""
    problem = None
    model, optimizer = model_state(engine), optimizer_state(engine)
    if distributed.is_main():
        try:
            _write_folder(folder, model, optimizer, state)
        except CheckpointError as error:
            problem = str(error)
        except (OSError, SafetensorError) as error:
            problem = f"could not save {folder}: {error}; the checkpoints before it are untouched"
    problem = distributed.broadcast_object(problem)
    if problem:
        raise CheckpointError(problem)
    return folder


def _write_folder(folder: Path, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: Mapping[str, Any]) -> None:
    for name, value in model.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(f"did not save {folder}: {name} is not finite; the checkpoints before it are untouched")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_file(model, partial / "model.safetensors")
        save_file(optimizer, partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        for file in partial.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if folder.exists():  # the same step saved before: same contents
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def existing(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob("step-*")
    return sorted(f for f in folders if re.fullmatch(r"step-\d{8}", f.name) and (f / "state.json").exists())


def prune(run: Path, keep: int) -> None:
    """Remove all but the last `keep` checkpoints; those marked as milestones stay."""
    for folder in existing(run)[:-keep]:
        if not json.loads((folder / "state.json").read_text()).get("milestone"):
            shutil.rmtree(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    try:
        state = json.loads((folder / "state.json").read_text())
        return {key: state[key] for key in STATE}
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read {folder / 'state.json'}: {error!r}{REMOVE}") from error


def load_model(module: nn.Module, folder: Path) -> None:
    """Give a module the parameters and buffers of a checkpoint; before DeepSpeed wraps it."""
    load_strictly(module, read_tensors(folder / "model.safetensors"), str(folder))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises CheckpointError if it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}{REMOVE}") from error


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict; every missing, extra or misshapen key is listed and nothing is loaded."""
    own = module.state_dict()
    problems = [f"missing {key}" for key in own if key not in tensors]
    problems += [f"extra {key}" for key in tensors if key not in own]
    problems += [
        f"{key} has shape {tuple(tensors[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own if key in tensors and tensors[key].shape != own[key].shape
    ]  # fmt: skip
    if problems:
        raise CheckpointError(f"{source} does not fit this model ({len(problems)} keys): " + "; ".join(problems))
    module.load_state_dict(tensors)


# Run directories --------------------------------------------------------------------------------------------------------


def open_run(config: configs.RunConfig, root: Path = Path("runs")) -> tuple[Path, Path | None]:
    """The run directory, made if it is new, and the checkpoint to go on from (None: from the start).

    Rank 0 decides. Raises CheckpointError if a named directory holds another run, if there is nothing to resume, or if the resumed
    run's configuration disagrees.
    """
    outcome: tuple[Path, Path | None] | Exception | None = None
    if distributed.is_main():
        try:
            outcome = _resume(config, root) if config.resume else (_new_run(config, root), None)
        except (CheckpointError, configs.ConfigError, OSError) as error:
            outcome = error
    outcome = distributed.broadcast_object(outcome)
    if isinstance(outcome, Exception):
        raise CheckpointError(str(outcome)) from outcome
    assert outcome is not None
    return outcome


def _new_run(config: configs.RunConfig, root: Path) -> Path:
    if config.run:
        run = Path(config.run)
        if run.exists() and any(run.iterdir()):
            raise CheckpointError(f"run {run} already holds another run; choose another name, or --resume to go on with it")
        run.mkdir(parents=True, exist_ok=True)
    else:
        numbers = [
            int(match[1])
            for path in root.glob(f"{config.name}-*")
            if (match := re.fullmatch(rf"{re.escape(config.name)}-(\d+)", path.name))
        ]
        run = root / f"{config.name}-{max(numbers, default=0) + 1:03d}"
        run.mkdir(parents=True)
    configs.save(config, run / "config.json")
    return run


def _resume(config: configs.RunConfig, root: Path) -> tuple[Path, Path | None]:
    if config.run:
        run = Path(config.run)
    else:
        runs = sorted(path for path in root.glob(f"{config.name}-*") if re.fullmatch(rf"{re.escape(config.name)}-\d+", path.name))
        if not runs:
            raise CheckpointError(f"nothing to resume: no {root}/{config.name}-NNN here")
        run = max(runs, key=lambda path: int(path.name.rpartition("-")[2]))
    if not (run / "config.json").exists():
        raise CheckpointError(f"nothing to resume: {run} holds no run (no config.json)")
    different = configs.differences(configs.load(run / "config.json"), config)
    if different:
        raise CheckpointError(f"{run} was started with another configuration: " + "; ".join(different))
    checkpoints = existing(run)
    return run, checkpoints[-1] if checkpoints else None


# The encoder ------------------------------------------------------------------------------------------------------------


def export_encoder(run: Path, checkpoint: Path, config: configs.RunConfig) -> Path:
    """Write `encoder.safetensors` with the encoder library's own key names, so that torchvision or timm load it as it is."""
    prefix = "encoder.net."
    tensors = {
        key.removeprefix(prefix): value for key, value in read_tensors(checkpoint / "model.safetensors").items() if key.startswith(prefix)
    }
    path = run / "encoder.safetensors"
    partial = path.with_suffix(".partial")
    metadata = {"format": "pt", "encoder": json.dumps(configs.to_dict(config)["encoder"]), "image_size": str(config.input.image_size)}
    try:
        save_file(tensors, partial, metadata=metadata)
        partial.rename(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"could not save {path}: {error}; the checkpoints are untouched") from error
    return path


def build_encoder(config: configs.RunConfig) -> VisionEncoder:
    """The encoder that a configuration describes, with fresh weights from torch's current random state."""
    e = config.encoder
    return build_vision(
        e.name, image_size=config.input.image_size, pooling=e.pooling, patch_size=e.patch_size, layer_scale=e.layer_scale,
        stem=e.stem, drop_path=e.drop_path,
        **({} if e.zero_init_residual is None else {"zero_init_residual": e.zero_init_residual}),
    )  # fmt: skip


def load_encoder(run: Path) -> VisionEncoder:
    """The trained encoder of a run directory, in eval mode on the CPU."""
    encoder = build_encoder(configs.load(run / "config.json"))
    load_strictly(encoder.net, read_tensors(run / "encoder.safetensors"), str(run / "encoder.safetensors"))
    return encoder.eval()
