"""VICReg (arXiv:2105.04906): two views of an image must agree, and neither may collapse."""

from vicreg_mm.objectives import OBJECTIVES
from vicreg_mm.objectives.graph import Edge, GraphObjective, ViewGraph
from vicreg_mm.objectives.weighting import FixedWeights


@OBJECTIVES.register("vicreg")
def vicreg(
    convention: str = "mean",
    lambda_: float = 25.0,
    mu: float = 25.0,
    nu: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-4,
) -> GraphObjective:
    """One edge between global_0 and global_1.

    lambda * inv + mu * (var_0 + var_1) / 2 + nu * (cov_0 + cov_1) / 2 in convention "mean"; "official", "paper" and
    "formula" multiply the terms as `weighting.CONVENTIONS` says. gamma: the standard deviation below which a dimension is
    penalised. eps: added to the variance inside its root.
    Raises ValueError for a negative weight, a gamma or eps that is not positive, an unknown convention.
    """
    weighting = FixedWeights(lambda_, mu, nu, convention)
    graph = ViewGraph((Edge("global_0", "global_1"),))
    return GraphObjective(graph, weighting, gamma, eps, correction=weighting.convention.correction)
