"""Parameter groups, LARS and the learning-rate schedule."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vicreg_mm.config import OptimConfig


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: parameters with at least two dimensions, decayed; biases, norms and other 1-d and 0-d ones, not decayed."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay, "name": "decayed"},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0, "name": "not_decayed"},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(groups: Iterable[dict], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer named by the configuration; its learning rate is set before every step."""
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=config.betas)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum)
    return LARS(groups, lr=0.0, momentum=config.momentum)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling, as VICReg was trained.

    With d = g + weight_decay * w:   d <- d * eta |w| / |d|   for parameters of at least two dimensions (both norms positive),
    m <- momentum * m + d,   w <- w - lr * m. Parameters of fewer dimensions take d = g, unscaled.
    Needs whole parameters: under ZeRO stage >= 1 an optimizer sees flat pieces of all of them.
    Source: arXiv:1708.03888; the variant of facebookresearch/vicreg, main_vicreg.py (the norm of the decayed gradient in the
    denominator, where timm and the paper add the norms).
    """

    def __init__(self, params: Iterable, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, eta: float = 1e-3):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim > 1:
                    update = update.add(p, alpha=group["weight_decay"])
                    weight_norm, update_norm = torch.linalg.vector_norm(p), torch.linalg.vector_norm(update)
                    trust = torch.where((weight_norm > 0) & (update_norm > 0), group["eta"] * weight_norm / update_norm, 1.0)
                    update = update * trust
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                p.add_(momentum, alpha=-group["lr"])
        return loss


@dataclass(frozen=True)
class Schedule:
    """Learning rate per step: linear warm-up, then a cosine.

    Step s < w: peak (s + 1) / w. After it: final + (peak - final) (1 + cos(pi (s - w) / (total - w))) / 2.
    total, w = `warmup`: in optimizer steps. final = peak * `final_ratio`.
    """

    peak: float
    total: int
    warmup: int = 0
    final_ratio: float = 0.0

    def lr(self, step: int) -> float:
        """The learning rate of step 0, 1, ..., total - 1."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        final = self.peak * self.final_ratio
        return final + (self.peak - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the rate `lr` times the group's own `lr_scale` (1 where it has none)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
