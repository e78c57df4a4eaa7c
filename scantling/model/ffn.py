"""Feed-forward layers: dense, low-rank, block-shuffle, block-dense (gated or not), and routed experts around any of them.

The structured maps follow arXiv 2406.16450 section 2.1: two linear factors, no non-linearity or bias between them.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from scantling.model.norm import for_products
from scantling.parts import BlockDenseFFN, BlockShuffleFFN, DenseFFN, ExpertFFN, LowRankFFN, MoEFFN

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class LowRankLinear(nn.Module):
    """y = U (V x) + bias; V: rank x in, U: out x rank."""

    def __init__(self, width_in: int, width_out: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.down = nn.Linear(width_in, rank, bias=False)
        self.up = nn.Linear(rank, width_out, bias=bias)

    def forward(self, x: Float[Tensor, "*batch width_in"]) -> Float[Tensor, "*batch width_out"]:
        return self.up(self.down(x))

    def merge(self) -> Float[Tensor, "width_out width_in"]:
        """The dense matrix of this map, without the bias."""
        return self.up.weight @ self.down.weight


class BlockDiagonal(nn.Module):
    """num_blocks independent maps of equal size side by side. weight: (blocks, out/blocks, in/blocks)."""

    def __init__(self, width_in: int, width_out: int, num_blocks: int) -> None:
        super().__init__()
        if width_in % num_blocks or width_out % num_blocks:
            raise ValueError(f"{num_blocks} blocks must divide both widths, got {width_in} and {width_out}")
        self.weight = nn.Parameter(torch.empty(num_blocks, width_out // num_blocks, width_in // num_blocks))

    def forward(self, x: Float[Tensor, "*batch width_in"]) -> Float[Tensor, "*batch width_out"]:
        blocks, out, into = self.weight.shape
        by_block = x.reshape(-1, blocks, into).transpose(0, 1)
        y = torch.bmm(by_block, self.weight.transpose(1, 2)).transpose(0, 1)
        return y.reshape(*x.shape[:-1], blocks * out)


def shuffle(x: Float[Tensor, "*batch width"], rows: int) -> Float[Tensor, "*batch width"]:
    """Read x as (rows, width/rows), transpose, flatten."""
    return x.unflatten(-1, (rows, -1)).transpose(-1, -2).flatten(-2)


class BlockShuffleLinear(nn.Module):
    """y = f^-1(U_b f(V_b x)) + bias with f the perfect shuffle; inner width min(in, out)."""

    def __init__(self, width_in: int, width_out: int, num_blocks: int, bias: bool) -> None:
        super().__init__()
        inner = min(width_in, width_out)
        self.num_blocks = num_blocks
        self.down = BlockDiagonal(width_in, inner, num_blocks)
        self.up = BlockDiagonal(inner, width_out, num_blocks)
        self.bias = nn.Parameter(torch.empty(width_out)) if bias else None

    def forward(self, x: Float[Tensor, "*batch width_in"]) -> Float[Tensor, "*batch width_out"]:
        z = self.down(x)
        y = shuffle(self.up(shuffle(z, z.shape[-1] // self.num_blocks)), self.num_blocks)
        return y if self.bias is None else y + self.bias

    def merge(self) -> Float[Tensor, "width_out width_in"]:
        """The dense matrix of this map, both shuffles included, without the bias."""
        first = torch.block_diag(*self.down.weight)  # columns are inputs; shuffles move its rows
        mixed = shuffle(first.T, first.shape[0] // self.num_blocks).T
        return shuffle((torch.block_diag(*self.up.weight) @ mixed).T, self.num_blocks).T


class BlockDenseLinear(nn.Module):
    """y = U (V_b x) + bias; V_b block-diagonal into `rank`, U dense out of it."""

    def __init__(self, width_in: int, width_out: int, rank: int, num_blocks: int, bias: bool) -> None:
        super().__init__()
        self.down = BlockDiagonal(width_in, rank, num_blocks)
        self.up = nn.Linear(rank, width_out, bias=bias)

    def forward(self, x: Float[Tensor, "*batch width_in"]) -> Float[Tensor, "*batch width_out"]:
        return self.up(self.down(x))

    def merge(self) -> Float[Tensor, "width_out width_in"]:
        """The dense matrix of this map, without the bias."""
        return self.up.weight @ torch.block_diag(*self.down.weight)


def linear(spec: ExpertFFN, width_in: int, width_out: int) -> nn.Module:
    """One feed-forward linear of the spec's structure."""
    match spec:
        case DenseFFN():
            return nn.Linear(width_in, width_out, bias=spec.bias)
        case LowRankFFN():
            return LowRankLinear(width_in, width_out, spec.rank, spec.bias)
        case BlockShuffleFFN():
            return BlockShuffleLinear(width_in, width_out, spec.num_blocks, spec.bias)
        case BlockDenseFFN():
            return BlockDenseLinear(width_in, width_out, spec.rank, spec.num_blocks, spec.bias)
    raise AssertionError(f"no module for ffn {spec!r}")


class FeedForward(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) when gated.

    A gated structured FFN is one linear to 2 x inner (gate first), so that both halves share the first factor.
    """

    def __init__(self, spec: ExpertFFN, width: int, width_out: int) -> None:
        super().__init__()
        inner = spec.intermediate_size
        self.act: Callable[[Tensor], Tensor] = ACTIVATIONS[spec.hidden_act]
        self.gated = spec.gated
        if spec.gated and isinstance(spec, DenseFFN):
            self.gate_proj = nn.Linear(width, inner, bias=spec.bias)
            self.up_proj: nn.Module = nn.Linear(width, inner, bias=spec.bias)
        elif spec.gated:
            self.gate_up_proj = linear(spec, width, 2 * inner)
        else:
            self.up_proj = linear(spec, width, inner)
        self.down_proj = linear(spec, inner, width_out)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        x = for_products(x)
        if not self.gated:
            hidden = self.act(self.up_proj(x))
        elif hasattr(self, "gate_proj"):
            hidden = self.act(self.gate_proj(x)) * self.up_proj(x)
        else:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
            hidden = self.act(gate) * up
        return self.down_proj(hidden)


class MixtureOfExperts(nn.Module):
    """Each token goes through its top-k experts, weighted by the router; a shared expert serves every token.

    After a forward pass `auxiliary` is experts x sum_e p_e f_e + z x mean(logsumexp(logits)^2): p the router's mean
    probabilities, f the shares of choices (arXiv 2606.18246, section 3).
    """

    def __init__(self, spec: MoEFFN, width: int, width_out: int) -> None:
        super().__init__()
        self.spec = spec
        self.gate = nn.Linear(width, spec.num_local_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(spec.expert, width, width_out) for _ in range(spec.num_local_experts))
        self.shared_expert = (
            FeedForward(spec.shared_expert, width, width_out) if spec.shared_expert is not None else None
        )
        self.auxiliary: Tensor | float = 0.0

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        chosen_count = self.spec.num_experts_per_tok
        tokens = x.reshape(-1, x.shape[-1])
        logits = self.gate(tokens)
        weights, chosen = self._route(logits)
        order = chosen.flatten().argsort(stable=True)
        counts = self._counts(chosen)
        routed = tokens[order // chosen_count].split(counts)
        outputs = torch.cat([expert(part) for expert, part in zip(self.experts, routed, strict=True)])
        weighted = outputs * weights.flatten()[order][:, None]
        zeros = tokens.new_zeros(len(tokens), outputs.shape[-1])
        mixed = zeros.index_add(0, order // chosen_count, weighted.to(tokens.dtype))
        if self.shared_expert is not None:
            mixed = mixed + self.shared_expert(tokens)
        self.auxiliary = self._auxiliary(logits, counts) if self.training else 0.0
        return mixed.reshape(*x.shape[:-1], -1)

    def _route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and indices of the chosen experts, each (tokens, k)."""
        if self.spec.router_softmax == "after":
            top, chosen = logits.topk(self.spec.num_experts_per_tok, dim=-1)
            return top.softmax(dim=-1), chosen
        top, chosen = logits.softmax(dim=-1).topk(self.spec.num_experts_per_tok, dim=-1)
        return top / top.sum(-1, keepdim=True) if self.spec.norm_topk_prob else top, chosen

    def _auxiliary(self, logits: Tensor, counts: list[int]) -> Tensor:
        probabilities = logits.float().softmax(-1).sum(0)
        shares = torch.tensor(counts, dtype=torch.float32, device=logits.device)
        balance = len(counts) * (probabilities / probabilities.sum() * (shares / shares.sum())).sum()
        return balance + self.spec.router_z_loss_coef * logits.float().logsumexp(-1).square().mean()

    def _counts(self, chosen: Tensor) -> list[int]:
        """Tokens per expert; without data (meta device) an even split, whose cost is the same."""
        experts = len(self.experts)
        if chosen.is_meta:
            each, rest = divmod(chosen.numel(), experts)
            return [each + (index < rest) for index in range(experts)]
        counts: list[int] = torch.bincount(chosen.flatten(), minlength=experts).tolist()
        return counts


def feed_forward(spec: ExpertFFN | MoEFFN, width: int, width_out: int) -> nn.Module:
    """The feed-forward module of a layer, from the stream's width to the coordinates it writes."""
    if isinstance(spec, MoEFFN):
        return MixtureOfExperts(spec, width, width_out)
    return FeedForward(spec, width, width_out)
