"""Solvers for the weights of a mixture: frozen dataclasses with `.solve(game, lam0=None, generator=None)`.

- `OracleSubgradient`: projected subgradient on best responses, exact or approximate. Algorithm 1.
- `AcceleratedEntropic`: accelerated gradient on the entropic relaxation over a pool of perturbations.
- `LinearProgram`: exact equilibria of finite games, by constraint generation; the double oracle on attacks.
- `Uniform`: weights 1/L, for comparison.

They use the `Game` protocol of `mixadv.game`, and import nothing of networks, data or attacks.
"""

from mixadv.lambda_solvers.driver import LambdaSolver
from mixadv.lambda_solvers.entropic import AcceleratedEntropic
from mixadv.lambda_solvers.lp import LinearProgram
from mixadv.lambda_solvers.oracle import OracleSubgradient
from mixadv.lambda_solvers.uniform import Uniform

__all__ = ["AcceleratedEntropic", "LambdaSolver", "LinearProgram", "OracleSubgradient", "Uniform"]
