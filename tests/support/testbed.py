"""Exact distillations in one and two dimensions, in float64: mixture teachers, students whose density is known, and
expectations by quadrature. What the losses promise is compared with derivatives of the divergences themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

F64 = torch.float64


@dataclass(frozen=True)
class Mixture:
    """Gaussians of standard deviations stds [K] about means [K, D] with weights [K]."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    def log_density(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        """log p_t at x_t [N, D] -> [N]."""
        var = alpha**2 * self.stds**2 + sigma**2
        square = (x_t[:, None] - alpha * self.means).square().sum(-1)
        dimensions = x_t.shape[1]
        log_normal = -square / (2 * var) - dimensions / 2 * torch.log(2 * torch.pi * var)
        return torch.logsumexp(self.weights.log() + log_normal, 1)


TEACHER_1D = Mixture(
    torch.tensor([0.3, 0.7], dtype=F64), torch.tensor([[-1.0], [1.5]], dtype=F64), torch.tensor([0.5, 0.7], dtype=F64)
)
TEACHER_2D = Mixture(
    torch.tensor([0.5, 0.3, 0.2], dtype=F64),
    torch.tensor([[-0.6, 0.3], [0.7, 0.5], [0.1, -0.8]], dtype=F64),
    torch.tensor([0.6, 0.5, 0.7], dtype=F64),
)


class Affine(nn.Module):
    """x0 = A z + b: Gaussian samples."""

    def __init__(self, dimensions: int):
        super().__init__()
        draws = torch.Generator().manual_seed(1)
        noise = torch.randn(dimensions, dimensions, generator=draws, dtype=F64)
        self.a = nn.Parameter(0.8 * torch.eye(dimensions, dtype=F64) + 0.15 * noise)
        self.b = nn.Parameter(torch.linspace(0.2, -0.1, dimensions, dtype=F64))

    def forward(self, z: Tensor) -> Tensor:
        return z @ self.a.T + self.b


class SmallMLP(nn.Module):
    """x0 = c z + W2 tanh(W1 z + b1) in one dimension: samples that are not Gaussian."""

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(2)
        self.first = nn.Parameter(torch.randn(6, generator=draws, dtype=F64))
        self.bias = nn.Parameter(torch.randn(6, generator=draws, dtype=F64))
        self.second = nn.Parameter(0.4 * torch.randn(6, generator=draws, dtype=F64))
        self.slope = nn.Parameter(torch.tensor(0.8, dtype=F64))

    def forward(self, z: Tensor) -> Tensor:
        return self.slope * z + (torch.tanh(z * self.first + self.bias) * self.second).sum(1, keepdim=True)


def trapezoid(bound: float, points: int) -> tuple[Tensor, Tensor]:
    """Nodes [points, 1] and weights [points] of the standard normal; spectrally accurate for smooth integrands."""
    x = torch.linspace(-bound, bound, points, dtype=F64)
    return x[:, None], torch.exp(-(x**2) / 2) / (2 * torch.pi) ** 0.5 * (x[1] - x[0])


def product(nodes: Tensor, weights: Tensor, dimensions: int) -> tuple[Tensor, Tensor]:
    """A one-dimensional rule [n, 1], [n] as a rule over `dimensions`: [n^dimensions, dimensions], [n^dimensions]."""
    columns = torch.meshgrid(*[nodes[:, 0]] * dimensions, indexing="ij")
    factors = torch.meshgrid(*[weights] * dimensions, indexing="ij")
    return torch.stack([column.flatten() for column in columns], 1), torch.stack(factors).prod(0).flatten()


@dataclass(frozen=True)
class Case:
    """One teacher, one student, one noise level.

    Attributes:
        z, z_weights: the rule over student noise, [M, D] and [M].
        eps, eps_weights: the rule over diffusion noise.
        x, cell: a grid [G, D] over noisy samples and the volume of its cells.
    """

    teacher: Mixture
    student: nn.Module
    alpha: float
    sigma: float
    z: Tensor
    z_weights: Tensor
    eps: Tensor
    eps_weights: Tensor
    x: Tensor
    cell: float

    def log_q(self, x_t: Tensor, *, frozen: bool) -> Tensor:
        """log q_t at x_t [N, D], differentiable in x_t, and in the student unless frozen."""
        if isinstance(self.student, Affine):
            a, b = self.student.a, self.student.b
            a, b = (a.detach(), b.detach()) if frozen else (a, b)
            covariance = self.alpha**2 * a @ a.T + self.sigma**2 * torch.eye(len(b), dtype=F64)
            return torch.distributions.MultivariateNormal(self.alpha * b, covariance).log_prob(x_t)
        x0 = self.student(self.z)
        x0 = x0.detach() if frozen else x0
        square = (x_t[:, None] - self.alpha * x0).square().sum(-1)
        normal = -square / (2 * self.sigma**2) - x_t.shape[1] / 2 * torch.log(
            torch.tensor(2 * torch.pi * self.sigma**2, dtype=F64)
        )
        return torch.logsumexp(self.z_weights.log() + normal, 1)

    def log_p(self, x_t: Tensor) -> Tensor:
        return self.teacher.log_density(x_t, self.alpha, self.sigma)

    def x0_prediction(self, log_density: Callable[[Tensor], Tensor], x_t: Tensor) -> Tensor:
        """Tweedie: (x_t + sigma^2 score) / alpha, differentiable in x_t."""
        (score,) = torch.autograd.grad(log_density(x_t).sum(), x_t, create_graph=True)
        return (x_t + self.sigma**2 * score) / self.alpha

    def gradient_of_loss(
        self, loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], *, through_x_t: bool
    ) -> list[Tensor]:
        """Gradient of E[loss(x0, teacher_x0, fake_x0, r)] in the student's parameters, expectation by quadrature and
        networks exact and frozen; the last three carry gradients of x_t if `through_x_t`."""
        rows, columns = len(self.z), len(self.eps)
        weights = (self.z_weights[:, None] * self.eps_weights).flatten()
        kept = weights > 1e-13 * weights.max()  # in four dimensions most of a product rule's nodes weigh nothing
        x0 = self.student(self.z.repeat_interleave(columns, 0)[kept])
        x_t = self.alpha * x0 + self.sigma * self.eps.repeat(rows, 1)[kept]
        weights = weights[kept]
        if not through_x_t:
            x_t = x_t.detach().requires_grad_(True)
        values = loss(x0, *self.evaluated(x_t))
        return list(torch.autograd.grad((weights * values).sum(), list(self.student.parameters())))

    def evaluated(self, x_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(teacher_x0, fake_x0, density ratio) at x_t."""
        teacher_x0 = self.x0_prediction(self.log_p, x_t)
        fake_x0 = self.x0_prediction(lambda at: self.log_q(at, frozen=True), x_t)
        return teacher_x0, fake_x0, (self.log_p(x_t) - self.log_q(x_t, frozen=True)).exp()

    def gradient_of_integral(self, integrand: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
        """Gradient of the integral over x of integrand(x, log p_t, log q_t), by a grid."""
        x = self.x.clone().requires_grad_(True)
        log_p, log_q = self.log_p(x), self.log_q(x, frozen=False)
        # Where both densities vanish every integrand does, but inf * 0 would not.
        inside = (log_p > -300) & (log_q > -300)
        value = torch.where(inside, integrand(x, log_p, log_q), torch.zeros_like(log_p)).sum() * self.cell
        return list(torch.autograd.grad(value, list(self.student.parameters())))


def case(name: str) -> Case:
    """ "affine" and "mlp" in one dimension, the first under EDM and the second under a scaled schedule; "affine-2d"."""
    if name == "affine-2d":
        z, weights = product(*trapezoid(6.6, 29), 2)
        grid = torch.linspace(-12, 12, 161, dtype=F64)
        x = torch.cartesian_prod(grid, grid)
        return Case(TEACHER_2D, Affine(2), 1.0, 1.1, z, weights, z, weights, x, (24 / 160) ** 2)
    z, weights = trapezoid(7.5, 121)
    grid = torch.linspace(-14, 14, 2001, dtype=F64)
    student, alpha, sigma = (Affine(1), 1.0, 0.8) if name == "affine" else (SmallMLP(), 0.8, 0.6)
    return Case(TEACHER_1D, student, alpha, sigma, z, weights, z, weights, grid[:, None], 28 / 2000)
