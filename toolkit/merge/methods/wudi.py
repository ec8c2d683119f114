"""WUDI: the merged delta that interferes least with what each task vector responds to.

The rows of a task vector of a linear layer span the inputs that the task saw, so the merged `tau` minimises

    sum_i ||(tau - tau_i) tau_i^T||_F^2 / ||tau_i||_F^2

over matrices `[N, K]`, `K` the inputs. This is a convex quadratic with the normal equations `tau G = B` for
`G = sum_i tau_i^T tau_i / ||tau_i||^2` and `B = sum_i tau_i tau_i^T tau_i / ||tau_i||^2`. `exact` solves them; where
they leave `tau` open, it is as near as can be to the sum of the task vectors. `adam` is the published algorithm,
which starts from that sum and stops long before the minimum: a step moves no element by much more than the learning
rate, whatever the size of the deltas.

Vectors are averaged, as the authors do. Tensors of more than two dimensions, which the authors average too, are
stacks of matrices here; `average` gives the authors' choice, and leaves out any tensor that a filter names.

Cheng et al., "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors", 2025
(arXiv:2503.08099).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import MethodParams
from toolkit.merge.ops import merge_matrices

TAKES = "deltas"
MODELS = (1, None)
USES_ALL = True
SCOPE = "tensor"

_MEAN_DECAY, _SQUARE_DECAY, _EPSILON = 0.9, 0.999, 1e-8
"""Adam's constants, those of its paper."""

Doubles = NDArray[np.float64]


class Params(MethodParams):
    """Parameters of `wudi`.

    Attributes:
        weight: of each model's delta.
        scale: `lambda` in a spec; of the merged delta.
        solver: `exact`, or `adam` as published.
        steps: of Adam.
        learning_rate: of Adam; the most, about, that one step moves an element.
        average: take the mean of the deltas instead.
    """

    weight: tuple[float, ...] = (1.0,)
    scale: float = Field(1.0, alias="lambda")
    solver: Literal["exact", "adam"] = "exact"
    steps: int = Field(300, ge=0)
    learning_rate: float = Field(1e-5, gt=0)
    average: bool = False


def combine(x: Floats, params: Params, state: None, start: int) -> Floats:
    """Merge one tensor of deltas `[M, *shape]`."""
    return merge_matrices(x, params.weight, params.scale, None if params.average else partial(_merge, params=params))


def memory(shape: tuple[int, ...], models: int) -> int:
    """Return an upper bound of the bytes that `combine` allocates, LAPACK's workspace included."""
    if len(shape) < 2:
        return 4096
    rows, columns = shape[-2:]
    side = min(columns, models * rows)
    basis = side * columns if side < columns else 0
    return 8 * (7 * rows * columns + 2 * basis + 6 * side**2 + 64 * side) + 4096


@dataclass(frozen=True)
class Objective:
    """The quadratic to minimise; half its gradient at `tau` `[N, K]` is `(tau @ factor - target) @ basis`.

    Attributes:
        factor: `[K, R]`.
        target: `[N, R]`.
        gram: `[R, R]`; `factor` is `basis^T`, or `gram` where there is no basis.
        basis: `[R, K]`, all rows of all task vectors over their norms; `None` for the identity.
    """

    factor: Doubles
    target: Doubles
    gram: Doubles
    basis: Doubles | None

    def residual(self, tau: Doubles) -> Doubles:
        """Return how far the normal equations are from holding, `[N, R]`."""
        product = tau @ self.factor
        return np.subtract(product, self.target, out=product)

    def half_gradient(self, tau: Doubles) -> Doubles:
        """Return half the gradient, `[N, K]`."""
        residual = self.residual(tau)
        return residual if self.basis is None else residual @ self.basis

    def minimiser(self, start: Doubles) -> Doubles:
        """Return the minimiser nearest to `start`, which is overwritten."""
        values, vectors = np.linalg.eigh(self.gram)
        # Eigenvalues are squares: what rounding to float32 adds to a matrix of low rank lies below this cut.
        rank = int(np.count_nonzero(values > values[-1] * len(values) * np.finfo(np.float64).eps))
        vectors = vectors[:, len(values) - rank :]
        step = self.residual(start) @ vectors
        np.divide(step, values[len(values) - rank :], out=step)
        step = step @ vectors.T
        return np.subtract(start, step if self.basis is None else step @ self.basis, out=start)


def objective(matrices: Floats) -> Objective:
    """Return the objective of task vectors `[M, N, K]`, of the smaller of its two forms."""
    changed = [matrix for matrix in matrices if matrix.any()]
    rows, columns = matrices.shape[1:]
    if len(changed) * rows < columns:
        units, norms = zip(*map(_unit, changed), strict=True)
        basis = np.concatenate(units)
        target = np.concatenate([norm * (unit @ unit.T) for unit, norm in zip(units, norms, strict=True)], axis=1)
        return Objective(basis.T, target, basis @ basis.T, basis)
    gram, target = np.zeros((columns, columns)), np.zeros((rows, columns))
    for matrix in changed:
        unit, norm = _unit(matrix)
        own = unit.T @ unit
        np.add(gram, own, out=gram)
        product = unit @ own
        np.add(target, np.multiply(product, norm, out=product), out=target)
    return Objective(gram, target, gram, None)


def _unit(matrix: Floats) -> tuple[Doubles, float]:
    """Return a matrix over its Frobenius norm, and the norm."""
    wide = matrix.astype(np.float64)
    norm = float(np.linalg.norm(wide))
    return np.divide(wide, norm, out=wide), norm


def _merge(matrices: Floats, params: Params) -> Floats:
    """Merge `[M, N, K]` to `[N, K]`."""
    start = matrices.sum(axis=0, dtype=np.float64)
    problem = objective(matrices)
    found = problem.minimiser(start) if params.solver == "exact" else _adam(problem, start, params)
    return found.astype(np.float32)


def _adam(problem: Objective, tau: Doubles, params: Params) -> Doubles:
    """Run Adam (arXiv:1412.6980) from `tau`, which is overwritten."""
    mean, square = np.zeros_like(tau), np.zeros_like(tau)
    for step in range(1, params.steps + 1):
        gradient = problem.half_gradient(tau)
        np.multiply(gradient, 2, out=gradient)
        np.multiply(mean, _MEAN_DECAY, out=mean)
        np.add(mean, (1 - _MEAN_DECAY) * gradient, out=mean)
        np.multiply(square, _SQUARE_DECAY, out=square)
        np.multiply(gradient, gradient, out=gradient)
        np.add(square, np.multiply(gradient, 1 - _SQUARE_DECAY, out=gradient), out=square)
        np.divide(square, 1 - _SQUARE_DECAY**step, out=gradient)
        np.add(np.sqrt(gradient, out=gradient), _EPSILON, out=gradient)
        np.divide(mean, gradient, out=gradient)
        rate = params.learning_rate / (1 - _MEAN_DECAY**step)
        np.subtract(tau, np.multiply(gradient, rate, out=gradient), out=tau)
    return tau
