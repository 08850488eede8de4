"""Encoder, expander and objective in the one module that DeepSpeed wraps: a batch of views -> loss, logs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vicreg_mm import objectives
from vicreg_mm.encoders import VisionEncoder, build_vision
from vicreg_mm.expander import Expander


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
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())


class PretrainModel(nn.Module):
    """Encode the views, expand the features, score the embeddings.

    joint: the encoder takes all views of one resolution in one forward instead of one view at a time; None: where it has no BatchNorm,
    whose statistics a joint batch would change. joint_expander: the same for the expander, whose BatchNorm then normalises the views of
    one resolution together.
    """

    encoder: VisionEncoder
    objective: Any  # a registered objective: nn.Module with `needs`

    def __init__(
        self,
        encoder: VisionEncoder,
        expander: Expander,
        objective: nn.Module,
        joint: bool | None = None,
        joint_expander: bool = False,
    ):
        super().__init__()
        self.encoder = encoder
        self.expander = expander
        self.objective = objective
        self.normalize = Normalize(encoder.mean, encoder.std)
        self.joint = not has_batchnorm(encoder) if joint is None else joint
        self.joint_expander = joint_expander

    def check_views(self, offered: Mapping[str, int]) -> None:
        """Raise ValueError unless the loader offers the views that the objective needs, no others, in sizes that the encoder takes.

        offered: pixels by view name.
        """
        needed = self.objective.needs.views
        missing = [name for name in needed if name not in offered]
        if missing:
            raise ValueError(
                f"the objective needs the views {', '.join(needed)}, but the loader offers only {', '.join(offered)}; "
                f"missing: {', '.join(missing)}"
            )
        unused = [name for name in offered if name not in needed]
        if unused:
            raise ValueError(f"the loader makes the views {', '.join(unused)} in vain: the objective needs only {', '.join(needed)}")
        for name in needed:
            self.encoder.check_size(name, offered[name])

    def encode(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Features [N, F] of every view that the objective needs; views: uint8 [N, 3, H, W]."""
        own = {name: views[name] for name in self.objective.needs.views if name in views}
        return _apply(self._features, own, _resolutions(own) if self.joint else [[name] for name in own])

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
        groups: Sequence[Sequence[str]] = [[name] for name in features]
        if self.joint_expander:
            assert resolutions is not None, "a joint expander must be told which views share a resolution"
            groups = resolutions
        embeddings = _apply(self.expander, features, groups)
        output = self.objective(embeddings, context)
        logs = {"loss/total": output.loss.detach()}
        logs.update({f"loss/{name}": term.detach() for name, term in output.terms.items()})
        for name, value in output.logs.items():
            kind = name.partition("/")[0]
            logs[f"loss/{name}" if kind in output.terms else f"stats/{name}"] = value
        first = next(iter(features))
        logs["features"] = features[first].detach()
        return output.loss, logs

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch.views`: uint8 [N, 3, H, W] by view name. Returns the loss and metrics by their name in metrics.jsonl."""
        features = self.encode(batch.views)
        return self.score(features, resolutions=_resolutions({name: batch.views[name] for name in features}))

    def after_step(self, progress: float) -> None:
        """Called after each optimizer step; progress: the share of the run that is done, 0 to 1."""
        if hasattr(self.objective, "after_step"):
            self.objective.after_step(progress)


def _resolutions(views: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of the views, those of one height and width together."""
    groups: dict[torch.Size, list[str]] = {}
    for name, view in views.items():
        groups.setdefault(view.shape[-2:], []).append(name)
    return list(groups.values())


def _apply(module: Callable[[Tensor], Tensor], inputs: Mapping[str, Tensor], groups: Iterable[Sequence[str]]) -> dict[str, Tensor]:
    """`module` of every input, those of a group in one call."""
    outputs: dict[str, Tensor] = {}
    for group in groups:
        joined = inputs[group[0]] if len(group) == 1 else torch.cat([inputs[name] for name in group])
        outputs.update(zip(group, module(joined).split([len(inputs[name]) for name in group]), strict=True))
    return {name: outputs[name] for name in inputs}


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
