"""Image encoders by name: "torchvision/resnet50", "timm/vit_large_patch16_224", "open_clip/ViT-B-32" -> features [N, F].

The networks are the libraries' own, without their classifier and with their own key names, so that what was trained here loads there.
The libraries are imported when one of their encoders is asked for.
"""

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vicreg_mm.batchnorm import update_statistics_once
from vicreg_mm.registry import unknown_name

SHORT_NAMES = {"resnet18": "torchvision/resnet18", "resnet50": "torchvision/resnet50", "vit": "timm/vit_base_patch16_224"}
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# layers in the notation of timm's `group_matcher`, for networks of other libraries
_RESNET_LAYERS = {"stem": r"^conv1|bn1", "blocks": r"^layer(\d+)\.(\d+)"}
_CLIP_LAYERS = {
    "stem": r"^class_embedding|positional_embedding|conv1|ln_pre",
    "blocks": [(r"^transformer\.resblocks\.(\d+)", None), (r"^ln_post", (99999,))],
}
_STAGES = ("layer1", "layer2", "layer3", "layer4")  # of a ResNet, in torchvision and in timm


class VisionEncoder(nn.Module):
    """Normalised images [N, 3, H, W] -> features [N, F].

    net: the library's module, classifier removed. mean, std: what the library normalises inputs in [0, 1] with.
    input_size: the side in pixels that the network is meant for; fixed_size: it takes no other. patch_size: sides must be its multiples
    (None: any side will do). patch_embedding: how the names of the parameters begin that cut the image into patches (with the norm behind
    them, in ConvNeXt's stem); None: the network is not known to have such. matcher: timm's description of its layers, for a net without
    `group_matcher`.
    """

    def __init__(
        self,
        net: nn.Module,
        name: str,
        num_features: int,
        input_size: int,
        patch_size: int | None = None,
        *,
        mean,
        std,
        fixed_size: bool = False,
        patch_embedding: str | None = None,
        matcher: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.net = net
        self.name = name
        self.num_features = num_features
        self.input_size = input_size
        self.patch_size = patch_size
        self.mean: tuple[float, float, float] = tuple(mean)
        self.std: tuple[float, float, float] = tuple(std)
        self.fixed_size = fixed_size
        self.patch_embedding = patch_embedding
        self._matcher = matcher

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def layers_after(self) -> dict[str, int]:
        """Parameter's name in `net` -> how many layers stand between it and the features, its own included.

        timm's grouping: 0 for a norm of the pooled features, 1 for the last block and the norm before the pooling, most for the stem.
        Raises ValueError for a network of which timm does not know the layers.
        """
        from timm.models._manipulate import group_with_matcher  # private; the public `group_parameters` knows no layer after the net's last

        matcher: Any = self._matcher or getattr(self.net, "group_matcher", lambda coarse: None)(coarse=False)
        if matcher is None:
            raise ValueError(f"the layers of encoder '{self.name}' are not known")
        rest = ("what stands behind the encoder", None)
        layers: Any = group_with_matcher(iter([*self.net.named_parameters(), rest]), matcher, reverse=True)
        last = layers.pop(rest[0])
        return {name: last - layer for name, layer in layers.items()}

    def check_size(self, view: str, size: int) -> None:
        """Raise ValueError for a view of a side that the network cannot take."""
        if self.fixed_size and size != self.input_size:
            raise ValueError(f"view {view} has {size} pixels, but encoder '{self.name}' takes images of {self.input_size} pixels only")
        if self.patch_size and size % self.patch_size:
            patch, below = self.patch_size, size // self.patch_size * self.patch_size
            choice = f"{below} or {below + patch}" if below else str(patch)
            raise ValueError(
                f"view {view} has {size} pixels, no multiple of the patch of encoder '{self.name}', {patch} pixels; choose {choice}"
            )

    def set_activation_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of keeping them; keys and BatchNorm statistics are as without it.

        To be called after `batchnorm.convert_sync_batchnorm`. Raises ValueError for a network that does not offer it.
        """
        if hasattr(self.net, "set_grad_checkpointing"):
            try:
                self.net.set_grad_checkpointing(enable)  # type: ignore[operator]
            except AssertionError:
                raise ValueError(f"encoder '{self.name}' offers no activation checkpointing") from None
        elif all(isinstance(getattr(self.net, stage, None), nn.Sequential) for stage in _STAGES):
            for stage in _STAGES:
                setattr(self.net, stage, (RecomputedBlocks if enable else nn.Sequential)(*getattr(self.net, stage)))
        else:
            raise ValueError(f"encoder '{self.name}' offers no activation checkpointing")
        if enable:
            update_statistics_once(self.net)


class RecomputedBlocks(nn.Sequential):
    """nn.Sequential that keeps only each block's input and computes the block again in the backward pass: torchvision's ResNets."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def build_vision(
    name: str,
    *,
    image_size: int | None = None,
    drop_path: float = 0.0,
    pooling: str | None = None,
    patch_size: int | None = None,
    layer_scale: float = 0.0,
    stem: str = "imagenet",
    zero_init_residual: bool | None = None,
    checkpointing: bool = False,
) -> VisionEncoder:
    """The encoder `name`, randomly initialised: "LIBRARY/NAME" or one of `SHORT_NAMES`.

    image_size: side of the (global) views; None is the library's own. drop_path: rate of stochastic depth.
    pooling: "token" or "avg", for ViTs; None is the library's own (the two have different final norms, so their files do not mix).
    patch_size: pixels, for timm's ViTs; None is the network's own. layer_scale: where LayerScale starts, for ViTs and ConvNeXts; 0 is the
    network's own (none for most ViTs, 1e-6 for ConvNeXts).
    stem: "imagenet", or "cifar" for small images (ResNets: 3 x 3 first convolution of stride 1, no max-pool).
    zero_init_residual: the last BatchNorm of every residual branch starts at 0 (ResNets; None: yes). checkpointing: recompute activations.
    Raises ValueError for an unknown name, and for an option that has no effect on the chosen encoder.
    """
    name = SHORT_NAMES.get(name, name)
    library, _, architecture = name.partition("/")
    if architecture not in _names(library):
        libraries = [library] if library in _BUILDERS else list(_BUILDERS)
        raise unknown_name("encoder", name, [*SHORT_NAMES, *(f"{lib}/{known}" for lib in libraries for known in _names(lib))])
    if stem not in ("imagenet", "cifar"):
        raise unknown_name("stem", stem, ["imagenet", "cifar"])
    if pooling not in (None, "token", "avg"):
        raise unknown_name("pooling", str(pooling), ["token", "avg"])
    if not 0.0 <= drop_path < 1.0:
        raise ValueError(f"drop_path {drop_path}; expected a rate from 0 to below 1")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size {image_size}; expected at least 1 pixel")
    if patch_size is not None and patch_size < 1:
        raise ValueError(f"patch_size {patch_size}; expected at least 1 pixel")
    given = {
        "image_size": image_size,
        "drop_path": drop_path or None,
        "pooling": pooling,
        "patch_size": patch_size,
        "layer_scale": layer_scale or None,
        "stem": None if stem == "imagenet" else stem,
        "zero_init_residual": zero_init_residual,
    }
    encoder = _BUILDERS[library](name, architecture, given)
    if encoder.patch_size and encoder.input_size % encoder.patch_size:
        raise ValueError(f"image_size {encoder.input_size} is no multiple of the patch of encoder '{name}', {encoder.patch_size} pixels")
    if checkpointing:
        encoder.set_activation_checkpointing(True)
    return encoder


def _names(library: str) -> list[str]:
    """The architectures of a library, [] for one that is not known; imports it."""
    if library == "torchvision":
        import torchvision

        return torchvision.models.list_models(module=torchvision.models, include="*resn*t*")
    if library == "timm":
        import timm

        return timm.list_models()
    if library == "open_clip":
        import open_clip

        return open_clip.list_models()
    return []


_NEUTRAL = {"drop_path": "0", "layer_scale": "0", "stem": "imagenet"}  # what an option is without effect, None elsewhere


def _refuse(name: str, given: dict[str, Any], *options: str) -> None:
    found = [option for option in options if given[option] is not None]
    if found:
        settings = " and ".join(f"{option}={given[option]!r}" for option in found)
        remedy = " ".join(f"--encoder.{option} {_NEUTRAL.get(option, 'None')}" for option in found)
        raise ValueError(f"{settings} {'has' if len(found) == 1 else 'have'} no effect on encoder '{name}'; leave out or give {remedy}")


def _build_torchvision(name: str, architecture: str, given: dict[str, Any]) -> VisionEncoder:
    """torchvision's ResNets; its other networks are in timm."""
    import torchvision

    _refuse(name, given, "drop_path", "pooling", "patch_size", "layer_scale")
    net = torchvision.models.get_model(architecture, weights=None, zero_init_residual=given["zero_init_residual"] is not False)
    num_features = net.fc.in_features
    net.fc = nn.Identity()
    if given["stem"] == "cifar":
        _shrink_stem(net)
    size = given["image_size"] or 224
    return VisionEncoder(net, name, num_features, size, mean=_IMAGENET_MEAN, std=_IMAGENET_STD, matcher=_RESNET_LAYERS)


def _build_timm(name: str, architecture: str, given: dict[str, Any]) -> VisionEncoder:
    import timm

    library_config: Any = timm.get_pretrained_cfg(architecture)
    # The families of ViT that interpolate their position embeddings, so that local views may be smaller.
    family = timm.models.model_entrypoint(architecture).__module__.rpartition(".")[2]
    is_vit, is_convnext = family in ("vision_transformer", "deit", "eva"), family == "convnext"
    options: dict[str, Any] = {"drop_path_rate": given["drop_path"]}
    if is_vit:
        options |= {"dynamic_img_size": True, "global_pool": given["pooling"], "patch_size": given["patch_size"]}
    else:
        _refuse(name, given, "pooling", "patch_size", *() if is_convnext else ("layer_scale",))
    if given["layer_scale"] is not None:
        options["init_values" if is_vit else "ls_init_value"] = given["layer_scale"]
    if is_vit or library_config.fixed_input_size:
        options["img_size"] = given["image_size"]
    if given["zero_init_residual"] is not None:
        options["zero_init_last"] = given["zero_init_residual"]
    try:
        net: Any = timm.create_model(architecture, pretrained=False, num_classes=0, **options)
    except TypeError as error:
        if "drop_path_rate" in str(error):
            _refuse(name, given, "drop_path")
        if "zero_init_last" in str(error):
            _refuse(name, given, "zero_init_residual")
        raise
    if given["stem"] == "cifar":
        if not isinstance(net, timm.models.ResNet):
            _refuse(name, given, "stem")
        _shrink_stem(net)
    patch_size = net.patch_embed.patch_size[0] if is_vit else None
    num_features = getattr(net, "head_hidden_size", net.num_features)
    input_size = given["image_size"] or library_config.input_size[-1]
    return VisionEncoder(
        net, name, num_features, input_size, patch_size, mean=library_config.mean, std=library_config.std,
        fixed_size=library_config.fixed_input_size and not is_vit,
        patch_embedding="patch_embed." if hasattr(net, "patch_embed") else "stem." if is_convnext else None,
    )  # fmt: skip


def _build_open_clip(name: str, architecture: str, given: dict[str, Any]) -> VisionEncoder:
    """The visual tower of a CLIP, without its projection: CLIP's own linear probes stand before it (arXiv:2103.00020, appendix A.3)."""
    import open_clip
    from open_clip.model import _build_vision_tower  # private; `create_model` would build the text tower, and download some of them

    config = open_clip.get_model_config(architecture)
    vision = dict(config["vision_cfg"])
    if vision.get("timm_model_name"):
        raise ValueError(f"encoder '{name}' is timm's; ask for 'timm/{vision['timm_model_name']}'")
    if not isinstance(vision.get("layers", 12), int):
        raise ValueError(
            f"encoder '{name}' is CLIP's modified ResNet, which has no features before its projection; ask for a ViT or for timm's"
        )
    _refuse(name, given, "drop_path", "patch_size", "stem", "zero_init_residual")
    vision["output_tokens"] = False
    vision["image_size"] = given["image_size"] or vision.get("image_size", 224)
    if given["layer_scale"]:
        vision["ls_init_value"] = given["layer_scale"]
    if given["pooling"]:
        vision["pool_type"] = {"token": "tok", "avg": "avg"}[given["pooling"]]
    net: Any = _build_vision_tower(config["embed_dim"], vision, quick_gelu=config.get("quick_gelu", False))
    net.proj = None
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    return VisionEncoder(
        net, name, net.ln_post.normalized_shape[0], net.image_size[0], net.patch_size[0], mean=mean, std=std,
        fixed_size=True, patch_embedding="conv1.", matcher=_CLIP_LAYERS,
    )  # fmt: skip


_BUILDERS = {"torchvision": _build_torchvision, "timm": _build_timm, "open_clip": _build_open_clip}


def _shrink_stem(net: Any) -> None:
    """First convolution of 3 x 3 and stride 1, no max-pool: the usual ResNet for 32-pixel images.

    A stem of three 3 x 3 convolutions keeps them and loses its stride.
    """
    if isinstance(net.conv1, nn.Sequential):
        net.conv1[0].stride = (1, 1)  # type: ignore[assignment]
    else:
        width = net.conv1.out_channels
        net.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")  # as both libraries initialise it
    net.maxpool = nn.Identity()
