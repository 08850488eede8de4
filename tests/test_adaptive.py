import pytest
import torch

from vicreg_mm import objectives
from vicreg_mm.objectives.learned_weights import BudgetWeights


def views(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {f"global_{i}": torch.randn(12, 8, generator=generator, dtype=dtype).requires_grad_() for i in range(2)}


@pytest.mark.parametrize("options", [{}, {"convention": "official", "lambda_": 5.0, "gamma": 2.0}])
def test_adaptive_is_vicreg_with_a_budget_until_the_weights_begin_to_move(options):
    adaptive, vicreg = objectives.build("adaptive", **options), objectives.build("vicreg", **options)
    assert isinstance(adaptive.weighting, BudgetWeights) and adaptive.weighting.bound == 2.0
    for progress in (0.05, 0.1):
        assert torch.equal(adaptive(views()).loss, vicreg(views()).loss)
        adaptive.after_step(progress)
    assert adaptive(views()).logs["weight_variance"] == vicreg.weighting.base(8)[1]
    adaptive.after_step(0.11)
    assert not torch.equal(adaptive(views()).loss, vicreg(views()).loss)


def test_adaptive_takes_the_other_modes_by_name():
    ours, theirs = (objectives.build(name, weighting="dual", weighting_rate=0.1, weighting_start=0.0) for name in ("adaptive", "vicreg"))
    for objective in (ours, theirs):
        objective(views())
        objective.after_step(1.0)
    assert torch.equal(ours(views()).loss, theirs(views()).loss)
