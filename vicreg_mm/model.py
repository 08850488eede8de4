"""Encoder, expander and objective in the one module that DeepSpeed wraps: a batch of views -> loss, logs."""

from collections.abc import Mapping
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

    joint: one forward for all views of one resolution instead of one per view; None: where the encoder has no BatchNorm, whose
    statistics a joint batch would change. The expander always sees one view at a time.
    """

    encoder: VisionEncoder
    objective: Any  # a registered objective: nn.Module with `needs`

    def __init__(self, encoder: VisionEncoder, expander: Expander, objective: nn.Module, joint: bool | None = None):
        super().__init__()
        self.encoder = encoder
        self.expander = expander
        self.objective = objective
        self.normalize = Normalize(encoder.mean, encoder.std)
        self.joint = not has_batchnorm(encoder) if joint is None else joint

    def check_views(self, offered: tuple[str, ...]) -> None:
        """Raise ValueError unless the loader offers every view that the objective needs."""
        needed = self.objective.needs.views
        missing = [name for name in needed if name not in offered]
        if missing:
            raise ValueError(
                f"the objective needs the views {', '.join(needed)}, but the loader offers only {', '.join(offered)}; "
                f"missing: {', '.join(missing)}"
            )

    def encode(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Features [N, F] of every view that the objective needs; views: uint8 [N, 3, H, W]."""
        names = [name for name in self.objective.needs.views if name in views]
        if not self.joint:
            return {name: self._features(views[name]) for name in names}
        features: dict[str, Tensor] = {}
        for size in dict.fromkeys(views[name].shape[-2:] for name in names):
            group = [name for name in names if views[name].shape[-2:] == size]
            images = torch.cat([views[name] for name in group])
            features.update(zip(group, self._features(images).chunk(len(group)), strict=True))
        return {name: features[name] for name in names}

    def _features(self, images: Tensor) -> Tensor:
        # transformers cannot reshape an empty batch; a rank without a good record encodes a black image and keeps none of it
        # (with BatchNorm it would count in the statistics, and convolutions need no such help)
        if len(images) or has_batchnorm(self.encoder):
            return self.encoder(self.normalize(images))
        return self.encoder(self.normalize(images.new_zeros(1, *images.shape[1:])))[:0]

    def score(self, features: Mapping[str, Tensor], context: Mapping[str, Any] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and logs of features that `encode` gave."""
        embeddings = {name: self.expander(f) for name, f in features.items()}
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
        return self.score(self.encode(batch.views))

    def after_step(self, progress: float) -> None:
        """Called after each optimizer step; progress: the share of the run that is done, 0 to 1."""
        if hasattr(self.objective, "after_step"):
            self.objective.after_step(progress)


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
