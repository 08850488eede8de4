"""Parameter groups, LARS and the schedule, against their formulas written out."""

import math

import pytest
import torch
from torch import nn

from vicreg_mm.config import OptimConfig
from vicreg_mm.optim import LARS, Schedule, build_optimizer, parameter_groups, set_lr


def test_only_parameters_of_two_dimensions_are_decayed():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    module.register_parameter("scale", nn.Parameter(torch.ones(())))
    decayed, spared = parameter_groups(module, 0.1)
    assert [p.ndim for p in decayed["params"]] == [4, 2] and decayed["weight_decay"] == 0.1
    assert all(p.ndim <= 1 for p in spared["params"]) and len(spared["params"]) == 5 and spared["weight_decay"] == 0.0


def test_frozen_parameters_are_in_no_group():
    module = nn.Linear(3, 2)
    module.weight.requires_grad_(False)
    assert [len(group["params"]) for group in parameter_groups(module, 0.1)] == [1]


def lars_by_hand(w, gradients, lr, momentum, decay, eta):
    m = torch.zeros_like(w)
    for g in gradients:
        if w.ndim > 1:
            d = g + decay * w
            d = d * eta * w.norm() / d.norm()
        else:
            d = g
        m = momentum * m + d
        w = w - lr * m
    return w


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2, 2), (5,), ()])
def test_lars_takes_the_published_steps(shape):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    gradients = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(5)]
    p = nn.Parameter(start.clone())
    optimizer = LARS([{"params": [p], "weight_decay": 0.3}], lr=0.5, momentum=0.9)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    torch.testing.assert_close(p.detach(), lars_by_hand(start, gradients, 0.5, 0.9, 0.3, 1e-3), rtol=1e-12, atol=1e-14)


def test_lars_steps_a_layer_that_starts_at_zero():
    p = nn.Parameter(torch.zeros(2, 2))
    p.grad = torch.ones(2, 2)
    LARS([p], lr=0.1).step()
    assert torch.equal(p.detach(), torch.full((2, 2), -0.1))


def test_the_schedule_warms_up_per_step_and_ends_at_its_floor():
    schedule = Schedule(peak=2.0, total=110, warmup=10, final_ratio=1e-3)
    assert schedule.lr(0) == pytest.approx(0.2)
    assert schedule.lr(9) == pytest.approx(2.0)
    assert schedule.lr(10) == pytest.approx(2.0)
    assert schedule.lr(60) == pytest.approx(0.002 + 1.998 * 0.5)
    assert schedule.lr(110) == pytest.approx(0.002)
    assert all(schedule.lr(s) > schedule.lr(s + 1) for s in range(10, 109))
    assert schedule.lr(85) == pytest.approx(0.002 + 1.998 * 0.5 * (1 + math.cos(0.75 * math.pi)))


def test_a_schedule_without_warmup_starts_at_the_peak():
    assert Schedule(peak=3.0, total=10).lr(0) == 3.0


def test_the_rate_reaches_every_group_at_its_own_scale():
    p, q = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = build_optimizer([{"params": [p]}, {"params": [q], "lr_scale": 0.2}], OptimConfig(name="adamw"))
    set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("lars", LARS)])
def test_optimizers_by_name(name, kind):
    assert type(build_optimizer([{"params": [nn.Parameter(torch.ones(2, 2))]}], OptimConfig(name=name))) is kind
