"""The command `vicreg-mm export`: a run's trained model as a folder that another library loads, with a card that says what it is.

open_clip    both towers, open_clip.create_model_and_transforms("local-dir:FOLDER"); what it holds: `open_clip_model`
timm         the image encoder, timm.create_model("local-dir:FOLDER", pretrained=True)
torchvision  the image encoder of a ResNet, as a state dict without `fc`

Each folder is loaded in its library and compared with the run's own towers before it takes its name. Images are scaled to the size of the
encoder and cropped there by open_clip; our own evaluation, and timm, scale to 256/224 of it first.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vicreg_mm import checkpoint
from vicreg_mm import config as configs
from vicreg_mm.assemble import build_model, needs_of
from vicreg_mm.encoder_file import EXPORT, open_encoder
from vicreg_mm.encoders import VisionEncoder
from vicreg_mm.input.tokenizer_json import tokenizer_json
from vicreg_mm.input.tokenizers import ClipTokenizer, Tokenizer, pack
from vicreg_mm.model_card import model_card
from vicreg_mm.open_clip_model import compared, library_and_name, to_open_clip

WEIGHTS = "model.safetensors"
TOLERANCE = 1e-4  # (assumed) of the largest feature; rounding is below 1e-5, another network above 1e-2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; usage: {self.usage}")


def main(arguments: list[str]) -> None:
    """Export what the arguments ask for."""
    parser = _Parser(usage=f"vicreg-mm export RUN --to {'|'.join(EXPORTS)} [--out FOLDER]", allow_abbrev=False)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--to", required=True, choices=list(EXPORTS), help="the library that shall load it")
    parser.add_argument("--out", type=Path, help="folder to write (default: RUN/LIBRARY)")
    options = parser.parse_args(arguments)
    if not (options.run / "config.json").is_file():
        raise ValueError(f"{options.run} holds no run (no config.json)")
    out = options.out or options.run / options.to
    for line in export(options.run, options.to, out):
        print(line)
    print(f"{options.to}: {out}")


def export(run: Path, library: str, out: Path) -> list[str]:
    """Write the model of a run directory for a library, one of `EXPORTS`, whole or not at all; returns what the user must be told.

    Raises ValueError for what the library cannot hold, a run without what is asked for, and an `out` that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists and is not empty; remove it or name another folder")
    with _whole(out) as folder, torch.random.fork_rng(devices=[]):
        usage, told = EXPORTS[library](run, folder)
        (folder / "README.md").write_text(model_card(run, library, usage))
    return told


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name at the end, and is removed if that is not reached."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(out)
    except OSError as error:
        raise ValueError(f"could not write {out}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# open_clip --------------------------------------------------------------------------------------------------------------


def _open_clip(run: Path, folder: Path) -> tuple[str, list[str]]:
    import open_clip

    config = configs.load(run / "config.json")
    saved = checkpoint.existing(run)
    if not saved:
        raise ValueError(f"{run} holds no checkpoint, from which both towers would be taken; train it, or name another run")
    tokenizer = checkpoint.read_tokenizer(saved[-1]) if needs_of(config).texts else None
    model = build_model(config, tokenizer)
    checkpoint.load_model(model, saved[-1])
    model.eval()
    found = to_open_clip(model)
    assert tokenizer is not None
    told, usage = _write_tokenizer(tokenizer, config.text.context, found.model_cfg["text_cfg"], folder)
    content = {"model_cfg": found.model_cfg, "preprocess_cfg": found.preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(content, indent=2) + "\n")
    save_file(found.tensors, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    images, tokens = _images(model.encoder), _tokens(tokenizer, config.text.context)
    with torch.no_grad():
        ours = compared(model, images, tokens)
    with _refusing(f"open_clip cannot hold encoder '{model.encoder.name}' as it was trained", "export it --to timm"), torch.no_grad():
        theirs = open_clip.create_model(f"local-dir:{folder}").eval()
        _require_equal(ours, (theirs.encode_image(images), theirs.encode_text(tokens)))
    if found.image_width != found.text_width:
        told.append(
            f"images have {found.image_width} features and texts {found.text_width}: open_clip can encode both but not compare them; "
            "train with --expander.projection WIDTH to give them a common space"
        )
    elif not found.trained_space:
        told.append(
            "the objective compares images and texts behind the expanders, which an open_clip model has not: there they meet before them, "
            "as in the rows 'encoder' of the run's evaluation"
        )
    return usage, told


def _write_tokenizer(tokenizer: Tokenizer, context: int, text_cfg: dict[str, Any], folder: Path) -> tuple[list[str], str]:
    """Write the tokenizer's files and name it in text_cfg; returns what to tell the user, and how to use the model."""
    if isinstance(tokenizer, ClipTokenizer):  # it pads with 0: behind the end token, where the causal text tower never looks
        return [], f"{_LOAD}{_TOKENIZER}{_ENCODE}"
    (folder / "tokenizer.model").write_bytes(tokenizer.serialize().partition(b"\n")[2])
    text_cfg["hf_tokenizer_name"] = "local-dir"  # any name: open_clip reads the tokenizer of a local-dir from the folder itself
    files = tokenizer_json(tokenizer, context)
    if files is None:
        own = _PIECES.format(context=context, inner=context - 2, start=tokenizer.start_id, end=tokenizer.end_id, pad=tokenizer.pad_id)
        told = ["open_clip.get_tokenizer cannot read this sentencepiece model; the README says how to tokenize with sentencepiece"]
        return told, f"{_LOAD}{own}{_ENCODE}"
    for name, content in files.items():
        (folder / name).write_bytes(content)
    told = ["open_clip.get_tokenizer needs the package transformers to read this tokenizer"]
    return told, f"{_LOAD}# needs `pip install transformers`\n{_TOKENIZER}{_ENCODE}"


_LOAD = 'import open_clip\n\nmodel, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")\nmodel.eval()\n'
_TOKENIZER = 'tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")\n'
_ENCODE = 'image_features = model.encode_image(preprocess(image)[None])\ntext_features = model.encode_text(tokenizer(["a caption"]))'
_PIECES = """
import sentencepiece
import torch

pieces = sentencepiece.SentencePieceProcessor(model_file="FOLDER/tokenizer.model")


def tokenizer(texts):
    rows = [[{start}, *pieces.encode(text)[:{inner}], {end}] for text in texts]
    return torch.tensor([row + [{pad}] * ({context} - len(row)) for row in rows])


"""


# The image encoder alone ------------------------------------------------------------------------------------------------


def _timm(run: Path, folder: Path) -> tuple[str, list[str]]:
    import timm
    from timm.models import save_for_hf

    encoder = open_encoder(str(run))
    library, architecture = library_and_name(encoder)
    if library == "open_clip":
        raise ValueError(f"encoder '{encoder.name}' is open_clip's, and timm has other names for it; export the run --to open_clip")
    net: Any = encoder.net
    if library == "torchvision":  # the same network under the same keys
        net = timm.create_model(architecture, num_classes=0)
        checkpoint.load_strictly(net, encoder.net.state_dict(), f"encoder '{encoder.name}'")
    size = encoder.input_size
    data = {"input_size": (3, size, size), "mean": encoder.mean, "std": encoder.std, "interpolation": "bicubic", "crop_pct": 0.875}
    save_for_hf(net, str(folder), safe_serialization=True, data_config=data)
    with _refusing(f"timm cannot build encoder '{encoder.name}' from its configuration", f"its weights are in {EXPORT} of the run"):
        theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        _compare(encoder, theirs)
    usage = (
        'import timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        f"features = model(transform(image)[None])  # [1, {encoder.num_features}]"
    )
    return usage, []


def _torchvision(run: Path, folder: Path) -> tuple[str, list[str]]:
    import torchvision

    encoder = open_encoder(str(run))
    library, architecture = library_and_name(encoder)
    known = torchvision.models.list_models(module=torchvision.models, include="*resn*t*")
    if library == "open_clip" or architecture not in known:
        raise ValueError(
            f"encoder '{encoder.name}' is none of torchvision's ResNets ({', '.join(known)}); export it --to timm or open_clip"
        )
    size, theirs = encoder.input_size, torchvision.models.get_model(architecture, weights=None)
    theirs.fc = nn.Identity()
    save_file({key: value.contiguous() for key, value in encoder.net.state_dict().items()}, folder / WEIGHTS, metadata={"format": "pt"})
    with _refusing(f"encoder '{encoder.name}' is another network than torchvision's {architecture}", "export it --to timm"):
        theirs.load_state_dict(load_file(folder / WEIGHTS))
        _compare(encoder, theirs.eval())
    usage = (
        "import torch\nimport torchvision\nfrom safetensors.torch import load_file\n\n"
        f"model = torchvision.models.{architecture}()\nmodel.fc = torch.nn.Identity()\n"
        f'model.load_state_dict(load_file("FOLDER/{WEIGHTS}"))\n'
        f"features = model.eval()((images - torch.tensor({encoder.mean})[:, None, None]) / torch.tensor({encoder.std})[:, None, None])"
        f"  # [N, 3, {size}, {size}] in [0, 1]"
    )
    return usage, []


EXPORTS = {"open_clip": _open_clip, "timm": _timm, "torchvision": _torchvision}


# The proof --------------------------------------------------------------------------------------------------------------


def _images(encoder: VisionEncoder) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, encoder.input_size, encoder.input_size)


def _tokens(tokenizer: Tokenizer, context: int) -> Tensor:
    """Rows of random ids, one that fills the context and one that ends before."""
    ids = torch.randint(tokenizer.vocab_size, (context,))
    kept = [i for i in ids.tolist() if i not in (tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id)]
    return torch.stack([torch.from_numpy(pack(part, context, tokenizer)) for part in (kept, kept[:1])])


def _compare(encoder: VisionEncoder, theirs: nn.Module) -> None:
    images = _images(encoder)
    with torch.no_grad():
        _require_equal((encoder(images),), (theirs(images),))


def _require_equal(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for own, loaded in zip(ours, theirs, strict=True):
        if own.shape != loaded.shape:
            raise ValueError(f"it gives features of shape {list(loaded.shape)} where ours give {list(own.shape)}")
        difference = ((own - loaded).abs().max() / own.abs().max()).item()
        if not difference <= TOLERANCE:
            raise ValueError(f"its features differ by {difference:.1e} of the largest")


@contextmanager
def _refusing(problem: str, remedy: str) -> Iterator[None]:
    """An error while a library loads what was written becomes one line: the library builds another network under that name."""
    try:
        yield
    except (ValueError, RuntimeError, AssertionError, TypeError, AttributeError) as error:
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"{problem}: {' '.join(said[:2])[:300]}; {remedy}") from error
