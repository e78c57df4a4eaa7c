"""Initial weights: every one set here, by a table a reader can check."""

import math

import torch
from torch import nn

from scantling.model.ffn import BlockDenseLinear, BlockDiagonal, BlockShuffleLinear, LowRankLinear
from scantling.model.norm import Norm
from scantling.parts import FanInInit, MuPInit, NormalInit
from scantling.spec import ModelSpec

WRITERS = (".o_proj", ".down_proj", ".down_proj.up")  # what writes into the residual stream


@torch.no_grad()
def initialise(model: nn.Module, spec: ModelSpec, seed: int) -> None:
    """Set every weight, drawn on the CPU in float32 in the order of the module tree.

    | parameter | `fan_in` (default) | `normal` | `mup` (the ><former) |
    |---|---|---|---|
    | embedding, head | N(0, 1/width) | N(0, std^2) | N(0, std^2) |
    | matrices | N(0, 1/fan_in) | N(0, std^2) | std sqrt(h/d)/sqrt(m_width) |
    | writers into the stream | / sqrt(2 layers) | / sqrt(2 layers) if depth_scaled | / sqrt(2 layers) |
    | structured linears | factors like matrices | see below | factors like matrices |
    | maps of transitions and branches | U(+-1/sqrt(fan_in)), torch's default | same | same |
    | biases, positions' table | 0; N(0, 0.02^2) | same | same |
    | norm gains; mixing weights | 1; 0 (equal shares) | same | same |

    Structured linears under `normal` start as their authors' do (arXiv 2406.16450, appendix A.1): low-rank factors from the
    truncated SVD of an N(0, std^2) draw, block factors from the polar factor of theirs.
    """
    draw = _Draw(spec, seed)
    skip: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in skip:
            continue
        if isinstance(module, Norm):
            module.weight.fill_(1.0)
            if module.bias is not None:
                module.bias.zero_()
        elif name.startswith(("resize", "branches.entries")) and isinstance(
            module, nn.Linear | nn.Conv1d | nn.ConvTranspose1d
        ):
            draw.framework_default(module)
        elif isinstance(module, LowRankLinear | BlockShuffleLinear | BlockDenseLinear) and isinstance(
            draw.init, NormalInit
        ):
            draw.structured(module, draw.init.std)
            skip |= set(module.modules())
        elif isinstance(module, nn.Linear | nn.Embedding | BlockDiagonal):
            draw.matrix(name, module)
        if isinstance(getattr(module, "bias", None), nn.Parameter) and not name.startswith(("resize", "branches")):
            module.bias.zero_()
    if spec.branches is not None:
        model.branches.weight.zero_()  # type: ignore[union-attr, operator]
        if spec.branches.mixing == "raw":
            model.branches.weight.fill_(0.5)  # type: ignore[union-attr, operator]


def spreads(model: nn.Module, spec: ModelSpec) -> dict[str, float]:
    """Standard deviation of every table and matrix that starts as N(0, std^2), by parameter name."""
    draw, found = _Draw(spec, 0), {}
    for name, module in model.named_modules():
        matrix = isinstance(module, nn.Linear | nn.Embedding | BlockDiagonal)
        if matrix and not name.startswith(("resize", "branches")):
            found[f"{name}.weight"] = draw.spread(name, module.weight)
    return found


class _Draw:
    """Random numbers of one initialisation, and the spreads of its table."""

    def __init__(self, spec: ModelSpec, seed: int) -> None:
        self.spec, self.init = spec, spec.initialization
        self.generator = torch.Generator().manual_seed(seed)
        depth = spec.num_hidden_layers
        self.writer_scale = (2 * depth) ** -0.5

    def normal(self, shape: torch.Size) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def matrix(self, name: str, module: nn.Linear | nn.Embedding | BlockDiagonal) -> None:
        if name == "lm_head" and self.spec.tie_word_embeddings:
            return
        module.weight.copy_(self.normal(module.weight.shape) * self.spread(name, module.weight))

    def spread(self, name: str, weight: torch.Tensor) -> float:
        """Standard deviation of one table or matrix."""
        writer = self.writer_scale if name.endswith(WRITERS) else 1.0
        table = name in ("embed_tokens", "lm_head")
        if name == "embed_positions":
            return 0.02
        match self.init:
            case FanInInit():
                return float(weight.shape[-1]) ** -0.5 * writer
            case NormalInit(std=std, depth_scaled=scaled):
                return std * (writer if scaled else 1.0)
            case MuPInit(std=std, m_width=m_width, variable=variable):
                if table:
                    return std
                base = self.init.base_width or self.spec.embedding_size
                own = math.sqrt(base / self.layer_width(name)) if variable else 1.0
                return std * own / math.sqrt(m_width) * writer
        raise AssertionError(self.init)

    def layer_width(self, name: str) -> int:
        """Width of the layer a parameter belongs to; for what writes into the stream, of its attention heads together."""
        layer = self.spec.layers[int(name.split(".")[1])]
        return layer.num_attention_heads * layer.v_head_dim if name.endswith(WRITERS) else layer.hidden_size

    def framework_default(self, module: nn.Linear | nn.Conv1d | nn.ConvTranspose1d) -> None:
        """U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weight and bias."""
        bound = float(module.weight[0].numel()) ** -0.5
        for parameter in module.parameters():
            parameter.copy_((torch.rand(parameter.shape, generator=self.generator) * 2 - 1) * bound)

    def structured(self, module: LowRankLinear | BlockShuffleLinear | BlockDenseLinear, std: float) -> None:
        """Spectral for low rank, orthonormal for block factors."""
        if isinstance(module, LowRankLinear):
            dense = self.normal(torch.Size((module.up.weight.shape[0], module.down.weight.shape[1]))) * std
            spectral_factors(dense, module.up.weight, module.down.weight)
        else:
            for factor in (module.down.weight, module.up.weight):
                factor.copy_(polar(self.normal(factor.shape) * std))
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()


def spectral_factors(dense: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
    """Fill up (out x rank) and down (rank x in) so that up down is the best rank-R approximation, balanced."""
    a, s, bt = torch.linalg.svd(dense, full_matrices=False)
    rank = down.shape[0]
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    up.zero_()
    down.zero_()
    up[:, :kept].copy_(a[:, :kept] * root)
    down[:kept].copy_(root[:, None] * bt[:kept])


def polar(matrix: torch.Tensor) -> torch.Tensor:
    """The polar factor A B^T of the thin SVD, of each matrix of a stack: all singular values 1."""
    a, _, bt = torch.linalg.svd(matrix, full_matrices=False)
    return a @ bt
