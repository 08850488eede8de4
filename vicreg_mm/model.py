"""Encoder, expander and objective in the one module that DeepSpeed wraps: a batch of views -> loss, logs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vicreg_mm import distributed, objectives
from vicreg_mm.encoders import TextEncoder, VisionEncoder, build_vision
from vicreg_mm.expander import Expander
from vicreg_mm.objectives.graph import TEXT_PREFIX

Output = Literal["expander", "encoder"]


class Normalize(nn.Module):
    """uint8 [N, 3, H, W] -> float32, (x / 255 - mean) / std per channel, on the device where x is."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images.float() - self.mean) / self.std


def has_batchnorm(module: nn.Module) -> bool:
    """Whether the module's output for one sample depends on the others in the batch."""
    if getattr(module, "frozen", False):
        return False
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())


class TextTower(nn.Module):
    """The text encoder of a model and what stands behind it: `projection` and `expander` as in `PretrainModel`."""

    encoder: TextEncoder

    def __init__(self, encoder: TextEncoder, expander: Expander | None, projection: nn.Linear | None = None):
        super().__init__()
        self.encoder = encoder
        self.expander = expander
        self.projection = projection


class PretrainModel(nn.Module):
    """Encode the views, expand the features, score the embeddings. Views called text_* are token ids and go through the text tower.

    joint: the encoder takes all views of one resolution in one forward instead of one view at a time; None: where it has no BatchNorm,
    whose statistics a joint batch would change. joint_expander: the same for the expander, whose BatchNorm then normalises the views of
    one resolution together. expander: None where the objective wants features alone. text: the text tower, where it wants texts.
    projection: between encoder and expander, features -> [N, P], the width that images and texts have in common; None: there is none.
    """

    encoder: VisionEncoder
    expander: Expander | None
    objective: Any  # a registered objective: nn.Module with `needs`
    text: TextTower | None

    def __init__(
        self,
        encoder: VisionEncoder,
        expander: Expander | None,
        objective: nn.Module,
        joint: bool | None = None,
        joint_expander: bool = False,
        text: TextTower | None = None,
        projection: nn.Linear | None = None,
    ):
        super().__init__()
        self.encoder = encoder
        self.expander = expander
        self.projection = projection
        self.objective = objective
        self.normalize = Normalize(encoder.mean, encoder.std)
        self.joint = not has_batchnorm(encoder) if joint is None else joint
        self.joint_expander = joint_expander
        self.text = text

    def check_views(self, offered: Mapping[str, int]) -> None:
        """`check_views` of this model's objective and encoder."""
        check_views(self.objective.needs.all_views, offered, self.encoder)

    def encode(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Features [N, F] of every view that the objective needs; views: uint8 [N, 3, H, W] of images, int64 [N, context] of texts."""
        own = {name: views[name] for name in self.objective.needs.all_views if name in views}
        images = {name: view for name, view in own.items() if not is_text(name)}
        texts = {name: view for name, view in own.items() if is_text(name)}
        features = _apply(self._features, images, _resolutions(images) if self.joint else [[name] for name in images])
        if texts:
            assert self.text is not None
            features |= _apply(self.text.encoder, texts, [list(texts)])  # no BatchNorm there
        return {name: features[name] for name in own}

    def _features(self, images: Tensor) -> Tensor:
        # transformers cannot reshape an empty batch; a rank without a good record encodes a black image and keeps none of it
        # (with BatchNorm it would count in the statistics, and convolutions need no such help)
        if len(images) or has_batchnorm(self.encoder):
            return self.encoder(self.normalize(images))
        return self.encoder(self.normalize(images.new_zeros(1, *images.shape[1:])))[:0]

    def score(
        self,
        features: Mapping[str, Tensor],
        context: Mapping[str, Any] | None = None,
        resolutions: Sequence[Sequence[str]] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and logs of features that `encode` gave. resolutions: the names of the views that share one, for `joint_expander`."""
        embeddings = self.embed(features, resolutions)
        needs = self.objective.needs
        context = {**(context or {}), "features": {name: features[name] for name in needs.features if name in features}}
        output = self.objective(embeddings, context)
        logs = {"loss/total": output.loss.detach()}
        logs.update({f"loss/{name}": term.detach() for name, term in output.terms.items()})
        for name, value in output.logs.items():
            kind = name.partition("/")[0]
            logs[name if kind == "loss" else f"loss/{name}" if kind in output.terms else f"stats/{name}"] = value
        first = next(iter(features))
        logs["features"] = features[first].detach()
        return output.loss, logs

    def embed(self, features: Mapping[str, Tensor], resolutions: Sequence[Sequence[str]] | None = None) -> dict[str, Tensor]:
        """Embeddings [N, D] of the views that the objective wants as such; arguments as in `score`."""
        own = {name: features[name] for name in self.objective.needs.views if name in features}
        groups: Sequence[Sequence[str]] = [[name] for name in own]
        if self.joint_expander:
            assert resolutions is not None, "a joint expander must be told which views share a resolution"
            groups = [members for group in resolutions if (members := [name for name in group if name in own])]
        embeddings: dict[str, Tensor] = {}
        for group in groups:
            kind = "text" if is_text(group[0]) else "image"
            embeddings |= _apply(partial(self._expanded, kind), {name: own[name] for name in group}, [group])
        return {name: embeddings[name] for name in own}

    def _tower(self, kind: str) -> "PretrainModel | TextTower":
        """What holds the projection and the expander of a kind of views."""
        return self if kind == "image" or self.text is None else self.text

    def _projected(self, kind: str, features: Tensor) -> Tensor:
        projection = self._tower(kind).projection
        return features if projection is None else projection(features)

    def _expanded(self, kind: str, features: Tensor) -> Tensor:
        expander = self._tower(kind).expander
        assert expander is not None
        return expander(self._projected(kind, features))

    def embed_images(self, images: Tensor, output: Output = "expander") -> Tensor:
        """uint8 [n, 3, H, W] -> [n, D], to be compared with texts by the cosine.

        output: "expander", the space in which the objective compares them; "encoder", the projected features, or where there is no
        projection the features themselves. Raises ValueError where these have not the same width for images and texts.
        """
        return self._compared("image", self._features(images), output)

    def embed_texts(self, tokens: Tensor, output: Output = "expander") -> Tensor:
        """int64 [n, context] -> [n, D] in the same space."""
        assert self.text is not None
        return self._compared("text", self.text.encoder(tokens), output)

    def _compared(self, kind: str, features: Tensor, output: Output) -> Tensor:
        if output == "encoder":
            self.check_common_width()
            return self._projected(kind, features)
        projections = getattr(self.objective, "projections", None)
        if projections:
            return projections[kind](features)
        comparable = getattr(self.objective, "comparable", lambda kind, z: z)
        return comparable(kind, self._expanded(kind, features))

    def check_common_width(self) -> None:
        """Raise ValueError unless what stands before the expanders has one width for images and texts."""
        assert self.text is not None
        if self.projection is None and self.encoder.num_features != self.text.encoder.num_features:
            raise ValueError(
                f"encoder '{self.encoder.name}' gives {self.encoder.num_features} features and the text encoder "
                f"{self.text.encoder.num_features}, which cannot be compared; train with --expander.projection, or compare what the "
                "expanders give"
            )

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch`: an `input.batch.Batch`. Returns the loss and metrics by their name in metrics.jsonl."""
        features = self.encode(batch.views)
        context: dict[str, Any] = {}
        image_ids = getattr(batch, "image_ids", None)
        if image_ids is not None:
            weights = duplicate_weights(image_ids)
            context["row_weights"] = {name: weights for name in features if not is_text(name)}
        return self.score(features, context, _resolutions({name: batch.views[name] for name in features}))

    def after_step(self, progress: float) -> None:
        """Called after each optimizer step; progress: the share of the run that is done, 0 to 1."""
        if hasattr(self.objective, "after_step"):
            self.objective.after_step(progress)


def is_text(view: str) -> bool:
    """Whether a view's name is that of a text."""
    return view.startswith(TEXT_PREFIX)


def duplicate_weights(ids: Tensor) -> Tensor:
    """1/m for a row whose id stands m times in the batch of all ranks: [n] -> [n] in float32. Every rank must call it."""
    everyone = distributed.gather_rows(ids, distributed.exchange_counts(len(ids), ids.device))
    return 1.0 / (ids[:, None] == everyone[None, :]).sum(1).float()


def _resolutions(views: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of the views, those of one height and width together; texts apart from images."""
    groups: dict[torch.Size, list[str]] = {}
    for name, view in views.items():
        groups.setdefault(view.shape[1:], []).append(name)
    return list(groups.values())


def _apply(module: Callable[[Tensor], Tensor], inputs: Mapping[str, Tensor], groups: Iterable[Sequence[str]]) -> dict[str, Tensor]:
    """`module` of every input, those of a group in one call."""
    outputs: dict[str, Tensor] = {}
    for group in groups:
        joined = inputs[group[0]] if len(group) == 1 else torch.cat([inputs[name] for name in group])
        outputs.update(zip(group, module(joined).split([len(inputs[name]) for name in group]), strict=True))
    return {name: outputs[name] for name in inputs}


def check_views(needed: Sequence[str], offered: Mapping[str, int], encoder: VisionEncoder) -> None:
    """Raise ValueError unless the loader offers the views that the objective needs, no others, in sizes that the encoder takes.

    offered: pixels (of texts: context) by view name.
    """
    remedy = "--num_local sets both sides" if any(name.startswith("local_") for name in {*needed} ^ {*offered}) else ""
    missing = [name for name in needed if name not in offered]
    if missing:
        raise ValueError(
            f"the objective needs the views {', '.join(needed)}, but the loader offers only {', '.join(offered)}; "
            f"missing: {', '.join(missing)}" + (f" ({remedy})" if remedy else "")
        )
    unused = [name for name in offered if name not in needed]
    if unused:
        raise ValueError(
            f"the loader makes the views {', '.join(unused)} in vain: the objective needs only {', '.join(needed)}"
            + ("; leave out --num_local, or take an objective of local views (multicrop)" if remedy else "")
        )
    for name in needed:
        if not is_text(name):
            encoder.check_size(name, offered[name])


class VICReg(nn.Module):
    """Two views -> VICReg loss, in plain torch, for anybody's own loop; also under DistributedDataParallel.

    loss = lambda_param * MSE(z1, z2) + mu_param * (v(z1) + v(z2)) / 2 + nu_param * (c(z1) + c(z2)) / 2, with the variance hinge v and the
    covariance penalty c over the batch of all ranks.
    backbone: a name of `encoders.build_vision` or a module [N, 3, H, W] -> [N, F] (then give `encoder_dim`).
    projector_final: "bn_relu", as in the reference document, or "linear", as in the paper and the official code.
    Views are normalised floats [N, 3, H, W]. Source: VICReg (arXiv:2105.04906) in the reference document's convention (`mean`).
    """

    def __init__(
        self,
        backbone: str | nn.Module = "resnet50",
        encoder_dim: int | None = None,
        projector_hidden_dim: int = 8192,
        projector_output_dim: int = 8192,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        variance_threshold: float = 1.0,
        projector_final: Literal["linear", "bn_relu"] = "bn_relu",
    ):
        super().__init__()
        self.encoder: nn.Module = build_vision(backbone) if isinstance(backbone, str) else backbone
        num_features = getattr(self.encoder, "num_features", encoder_dim)
        if num_features is None:
            raise ValueError("encoder_dim is missing: a module given as backbone does not tell how many features it has")
        if encoder_dim is not None and encoder_dim != num_features:
            raise ValueError(f"encoder_dim is {encoder_dim}, but the backbone gives {num_features} features; leave it out")
        widths = (projector_hidden_dim, projector_hidden_dim, projector_output_dim)
        self.projector = Expander(int(num_features), widths, final=projector_final)
        self.objective = objectives.build("vicreg", lambda_=lambda_param, mu=mu_param, nu=nu_param, gamma=variance_threshold)

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and the detached scalars loss, inv_loss, var_loss, cov_loss, std_mean (over both views)."""
        embeddings = {f"global_{i}": self.projector(self.encoder(view)) for i, view in enumerate((view1, view2))}
        output = self.objective(embeddings)
        metrics = {
            "loss": output.loss.detach(),
            "inv_loss": output.terms["invariance"].detach(),
            "var_loss": output.terms["variance"].detach(),
            "cov_loss": output.terms["covariance"].detach(),
            "std_mean": output.logs["std_mean"],
        }
        return output.loss, metrics
