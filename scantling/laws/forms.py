"""Closed forms of the laws: loss from parameters and tokens, its optimum and inverses, and downstream error from loss.

Symbols: N parameters, D training tokens, C = 6 N D training FLOPs, M = D/N, L loss in nats per token, E the loss no
model goes below. Everything is vectorised float64 (6 N D exceeds a 64-bit integer for large models).

Sources: Hoffmann et al. 2022 (arXiv 2203.15556), Gadre et al. 2024 (arXiv 2403.08540), Sardana et al. 2024
(arXiv 2401.00448).
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scantling.errors import InputError

Floats = npt.NDArray[np.float64]


def as_floats(values: npt.ArrayLike) -> Floats:
    """Any number or array as float64, so that integer products cannot overflow."""
    return np.asarray(values, dtype=np.float64)


@dataclass(frozen=True)
class Optimum:
    """The best split of C training FLOPs: N parameters, D tokens, M = D/N, and the loss there."""

    C: Floats
    N: Floats
    D: Floats
    M: Floats
    loss: Floats


@dataclass(frozen=True)
class InferenceOptimum:
    """The model that reaches a loss for the fewest training + inference FLOPs.

    Attributes:
        N: parameters.
        D: training tokens.
        training_flops: 6 N D.
        total_flops: 6 N D + 2 N D_inf.
    """

    N: float
    D: float
    training_flops: float
    total_flops: float


@dataclass(frozen=True)
class Chinchilla:
    """L(N, D) = E + A N^-alpha + B D^-beta, nats per token (arXiv 2203.15556, eq. 2)."""

    A: float
    B: float
    E: float
    alpha: float
    beta: float

    def __post_init__(self) -> None:
        faults = [
            f"chinchilla law: {name} must be a positive finite number, got {value}"
            for name, value in (("A", self.A), ("B", self.B), ("alpha", self.alpha), ("beta", self.beta))
            if not (math.isfinite(value) and value > 0)
        ]
        if not (math.isfinite(self.E) and self.E >= 0):
            faults.append(f"chinchilla law: E must be zero or more, got {self.E}")
        if faults:
            raise InputError(*faults)

    @property
    def vector(self) -> Floats:
        """(5,) A, B, E, alpha, beta."""
        return as_floats([self.A, self.B, self.E, self.alpha, self.beta])

    def loss(self, N: npt.ArrayLike, D: npt.ArrayLike) -> Floats:
        """E + A N^-alpha + B D^-beta."""
        return chinchilla_loss(self.vector, N, D)

    def optimum(self, C: npt.ArrayLike) -> Optimum:
        """The split of C = 6 N D that minimises the loss, see `compute_optimum`."""
        return compute_optimum(self.vector, C)

    def compute_for_loss(self, loss: npt.ArrayLike) -> Floats:
        """C*(L) = 6 ((L - E) / (A G^-alpha + B G^beta))^(-(alpha+beta)/(alpha beta)): the fewest FLOPs that reach L.

        Infinite where L <= E. Inverse of `optimum(C).loss` (arXiv 2404.10102).
        """
        g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        prefactor = self.A * g**-self.alpha + self.B * g**self.beta
        power = (self.alpha + self.beta) / (self.alpha * self.beta)
        return 6 * _inverse_power((as_floats(loss) - self.E) / prefactor, power)

    def tokens_for_loss(self, N: npt.ArrayLike, loss: npt.ArrayLike) -> Floats:
        """D(N, L) = (B / (L - E - A N^-alpha))^(1/beta); infinite when a model of N parameters never reaches L."""
        return _inverse_power((as_floats(loss) - self.E - self.A * as_floats(N) ** -self.alpha) / self.B, 1 / self.beta)

    def overtraining_factor(self, m: npt.ArrayLike) -> Floats:
        """h(m) = (beta m^(alpha/2) + alpha m^(-beta/2)) / (alpha+beta).

        Multiplies the reducible loss when the same compute is spent at m times the optimal D/N (N = N*/sqrt(m),
        D = sqrt(m) D*). Equivalent to arXiv 2403.08540, eq. 8.
        """
        m = as_floats(m)
        return (self.beta * m ** (self.alpha / 2) + self.alpha * m ** (-self.beta / 2)) / (self.alpha + self.beta)

    def overtraining_compute(self, m: npt.ArrayLike) -> Floats:
        """C_m / C* = h(m)^((alpha+beta)/(alpha beta)): compute that regains the best loss at m times the best D/N."""
        return self.overtraining_factor(m) ** ((self.alpha + self.beta) / (self.alpha * self.beta))

    def token_factor(self, size_factor: npt.ArrayLike) -> Floats:
        """k_D = [1 - (k_N^-alpha - 1) beta/alpha]^(-1/beta): tokens over D* that give k_N N* parameters the same loss.

        The compute overhead is k_N k_D - 1. Infinite when no amount of tokens suffices,
        k_N <= (1 + alpha/beta)^(-1/alpha).
        """
        bracket = 1 - (as_floats(size_factor) ** -self.alpha - 1) * self.beta / self.alpha
        return _inverse_power(bracket, 1 / self.beta)

    def inference_optimum(self, loss: float, inference_tokens: float) -> InferenceOptimum:
        """Minimise 6 N D + 2 N D_inf subject to L(N, D) = loss (arXiv 2401.00448).

        One unknown, log N: D follows from the loss, and the first-order condition
        alpha A N^-alpha / (beta B D^-beta) = 1 + D_inf/(3 D) changes sign once between the smallest model that reaches
        the loss and the compute-optimal one.

        Args:
            loss: target in nats per token.
            inference_tokens: D_inf, prompt plus generated tokens over the model's life.

        Raises:
            InputError: the target is not above E, or `inference_tokens` is negative or not finite.
        """
        if not loss > self.E:
            raise InputError(f"loss: the law never goes below E = {self.E:.6g}, got the target {loss:.6g}; raise it")
        if not (inference_tokens >= 0 and math.isfinite(inference_tokens)):
            raise InputError(f"inference_tokens: expected zero or more, got {inference_tokens}")
        largest = math.log(float(self.optimum(self.compute_for_loss(loss)).N))
        smallest = math.log(self.A / (loss - self.E)) / self.alpha

        def balance(log_n: float) -> float:
            d = float(self.tokens_for_loss(math.exp(log_n), loss))
            if math.isinf(d):
                return math.inf
            data_side = self.beta * self.B * d**-self.beta * (1 + inference_tokens / (3 * d))
            return float(self.alpha * (loss - self.E - self.B * d**-self.beta) / data_side - 1)

        log_n = largest
        if inference_tokens > 0:
            span = largest - smallest
            low = next(smallest + span * 10.0**-k for k in range(1, 15) if balance(smallest + span * 10.0**-k) > 0)
            from scipy.optimize import brentq  # loaded only when an optimum is asked for

            log_n = float(brentq(balance, low, largest, xtol=1e-13))
        n = math.exp(log_n)
        d = float(self.tokens_for_loss(n, loss))
        return InferenceOptimum(N=n, D=d, training_flops=6 * n * d, total_flops=6 * n * d + 2 * n * inference_tokens)


@dataclass(frozen=True)
class Downstream:
    """Err(L) = epsilon - k exp(-gamma L): mean task error from loss (arXiv 2403.08540, eq. 5)."""

    epsilon: float
    k: float
    gamma: float

    def error(self, loss: npt.ArrayLike) -> Floats:
        """The error at a loss; below epsilon everywhere, and above epsilon - k exp(-gamma E)."""
        return self.epsilon - self.k * np.exp(-self.gamma * as_floats(loss))


def chinchilla_loss(params: npt.ArrayLike, N: npt.ArrayLike, D: npt.ArrayLike) -> Floats:
    """E + A N^-alpha + B D^-beta.

    Args:
        params: (5, ...) A, B, E, alpha, beta, each broadcast with N and D, so that thousands of draws go at once.
        N: parameters.
        D: training tokens.
    """
    A, B, E, alpha, beta = as_floats(params)
    return as_floats(E + A * as_floats(N) ** -alpha + B * as_floats(D) ** -beta)


def compute_optimum(params: npt.ArrayLike, C: npt.ArrayLike) -> Optimum:
    """The split of C = 6 N D with the lowest loss (arXiv 2203.15556, eq. 4), parameters as in `chinchilla_loss`.

    G = (alpha A / (beta B))^(1/(alpha+beta)), N* = G (C/6)^(beta/(alpha+beta)), D* = (C/6)^(alpha/(alpha+beta)) / G.
    """
    A, B, _, alpha, beta = as_floats(params)
    c, total = as_floats(C), alpha + beta
    with np.errstate(
        over="ignore", under="ignore", divide="ignore", invalid="ignore"
    ):  # draws of a poor fit go anywhere
        g = (alpha * A / (beta * B)) ** (1 / total)
        n, d = as_floats(g * (c / 6) ** (beta / total)), as_floats((c / 6) ** (alpha / total) / g)
        return Optimum(C=c, N=n, D=d, M=as_floats(d / n), loss=chinchilla_loss(params, n, d))


def from_overtraining(E: float, a: float, b: float, eta: float) -> Chinchilla:
    """The law behind L(C, M) = E + (a M^eta + b M^-eta) C^-eta: alpha = beta = 2 eta, A = a 6^-eta, B = b 6^-eta.

    (arXiv 2403.08540, eq. 4 and appendix B; C = 6 N D and D = M N.)
    """
    return Chinchilla(A=a * 6**-eta, B=b * 6**-eta, E=E, alpha=2 * eta, beta=2 * eta)


def to_overtraining(law: Chinchilla) -> tuple[float, float, float]:
    """(a, b, eta) of L(C, M) = E + (a M^eta + b M^-eta) C^-eta; the inverse of `from_overtraining`.

    Raises:
        InputError: the exponents differ, so that the form does not exist.
    """
    if law.alpha != law.beta:
        raise InputError(
            f"the over-training form needs alpha = beta, got {law.alpha} and {law.beta}; fit with tied=True"
        )
    eta = law.alpha / 2
    return law.A * 6**eta, law.B * 6**eta, eta


def _inverse_power(x: Floats, power: float) -> Floats:
    """x^-power, infinite where x <= 0."""
    reachable = x > 0
    return as_floats(np.where(reachable, np.where(reachable, x, 1.0) ** -power, np.inf))
