"""The whole model: embedding, layers along the residual stream, parallel stacks, final norm, head."""

from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from scantling.model.ffn import MixtureOfExperts
from scantling.model.grouped import groupable, grouped_stacks
from scantling.model.init import initialise
from scantling.model.layer import Cache, Layer
from scantling.model.loss import Head, cross_entropy, finished
from scantling.model.norm import Norm
from scantling.model.stream import Resize, Stream, WideStream
from scantling.parts import Branches, CarryForward, Compress
from scantling.spec import ModelSpec


class Mix(nn.Module):
    """What parallel stacks read and how their outputs are mixed (arXiv 2404.14462)."""

    def __init__(self, spec: Branches, embedding: int, width: int) -> None:
        super().__init__()
        self.spec = spec
        if spec.entry == "projection":
            self.entries = nn.ModuleList(nn.Linear(embedding, width) for _ in range(spec.count))
        self.weight = nn.Parameter(torch.empty(spec.count if spec.mixing == "softmax" else 1))

    def entry(self, x: Float[Tensor, "batch seq width"], branch: int) -> Float[Tensor, "batch seq branch_width"]:
        """The input of one stack."""
        match self.spec.entry:
            case "projection":
                return self.entries[branch](x).to(x.dtype)
            case "split":
                return x.chunk(self.spec.count, dim=-1)[branch]
        return x

    def weights(self) -> Float[Tensor, " branches"]:
        """The share of each stack."""
        if self.spec.mixing == "softmax":
            return self.weight.softmax(0)
        first = self.weight if self.spec.mixing == "raw" else self.weight.sigmoid()
        return torch.cat((first, 1 - first))


class Decoder(nn.Module):
    """A decoder-only language model as its spec says. Parameter names are Hugging Face's (Llama) where it has them.

    Attributes:
        grouped_branches: compute layer i of all parallel stacks as one batched computation (`grouped.py`) where their
            layers allow it. The result is the same up to rounding. Off by default: on a CPU it gains only in tiny stacks
            (benchmarks/results/grouped_branches.md).
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.grouped_branches = False
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.embedding_size)
        if spec.learned_positions:
            self.embed_positions = nn.Embedding(spec.max_position_embeddings, spec.embedding_size)
        self.branches = (
            Mix(spec.branches, spec.embedding_size, spec.stacks[0][0].hidden_size) if spec.branches else None
        )
        self.layers = nn.ModuleList(Layer(layer) for layer in spec.layers)
        widths = spec.stream_widths
        self.resize = nn.ModuleList(
            Resize(spec.transition, have, width) for _ in spec.stacks for have, width in pairwise(widths[:-1])
        )
        self.resize_last = Resize(spec.transition, widths[-2], widths[-1], last=True)
        self.norm = Norm(spec.final_norm, spec.norm_width) if spec.final_norm else None
        self.lm_head = nn.Linear(spec.unembedding_size, spec.vocab_size, bias=spec.lm_head_bias)
        if spec.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        cache: Cache | None = None,
        single_branch: bool = False,
        documents: Int[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Logits at every given position; with `cache`, the positions continue the cached ones.

        Args:
            single_branch: run only the stack with the larger mixing weight; the spec says how its output is used.
            documents: the document of each position; attention stays within it.
        """
        products = self.lm_head(self.hidden(input_ids, cache, single_branch, documents))
        return finished(products, self.spec.logits_scaling, self.spec.final_logit_softcapping)

    def hidden(
        self,
        input_ids: Int[Tensor, "batch seq"],
        cache: Cache | None = None,
        single_branch: bool = False,
        documents: Int[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq unembedding_width"]:
        """What the head reads; arguments as in `forward`."""
        x = self.embed(input_ids, cache.length if cache else 0)
        if self.branches is None:
            return self._last(*self._stack(x, 0, cache, documents))
        shares = self.branches.weights()
        if single_branch:
            best = int(shares.argmax())
            x, stream = self._stack(self.branches.entry(x, best), best, cache, documents)
            how = self.branches.spec.single_branch
            return self._last(x * shares[best] if how == "scaled" else x, stream, normed=how != "bare")
        inputs = [self.branches.entry(x, branch) for branch in range(self.branches.spec.count)]
        outputs = self._stacks(inputs, cache, documents)
        mixed = sum(share * output for share, (output, _) in zip(shares, outputs, strict=True))
        return self._last(mixed, self._mixed_stream(shares, outputs))

    def _mixed_stream(self, shares: Tensor, outputs: list[tuple[Tensor, Stream]]) -> Stream:
        """What the stacks carry past their last layer, mixed like their outputs, for a head wider than that layer."""
        stream, width = Stream(), self.spec.unembedding_size
        if width > outputs[0][0].shape[-1] and not isinstance(self.spec.transition, Compress):
            stream.tails.append(
                sum(share * each.carried(x, width) for share, (x, each) in zip(shares, outputs, strict=True))
            )
        return stream

    def embed(self, input_ids: Int[Tensor, "batch seq"], start: int = 0) -> Float[Tensor, "batch seq width"]:
        """Token embeddings, with learned positions from `start` on where the spec has them."""
        x = self.embed_tokens(input_ids)
        if self.spec.learned_positions:
            positions = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
            x = x + self.embed_positions(positions)
        return x if self.spec.embedding_multiplier == 1.0 else x * self.spec.embedding_multiplier

    def _stacks(
        self, inputs: list[Tensor], cache: Cache | None, documents: Tensor | None
    ) -> list[tuple[Tensor, Stream]]:
        """Every stack from its input to its output: one by one, or grouped where asked for and possible."""
        if self.grouped_branches and documents is None and groupable(self.spec):
            return grouped_stacks(self.spec, self.layers, self.resize, inputs, cache)
        return [self._stack(x, branch, cache, documents) for branch, x in enumerate(inputs)]

    def _stack(self, x: Tensor, branch: int, cache: Cache | None, documents: Tensor | None) -> tuple[Tensor, Stream]:
        """One stack of layers from its input to its output.

        Without gradients, carry-forward updates one wide stream in place and copies nothing between layers.
        """
        depth = len(self.spec.stacks[0])
        indices = range(branch * depth, (branch + 1) * depth)
        if isinstance(self.spec.transition, CarryForward) and documents is None and not torch.is_grad_enabled():
            wide = WideStream(x, max(self.spec.stream_widths))
            for index in indices:
                x = wide.view(self.spec.layers[index].hidden_size)
                layer: Layer = self.layers[index]  # type: ignore[assignment]
                layer.update(x, cache.layers[index] if cache else None)
            return x, wide
        stream = Stream()
        for index in indices:
            x = self.resize[index](x, stream)
            x = self.layers[index](x, cache.layers[index] if cache else None, documents)
        return x, stream

    def _last(self, x: Tensor, stream: Stream, normed: bool = True) -> Float[Tensor, "batch seq unembedding_width"]:
        """The last layer's output as the head reads it. Carried coordinates come from the un-normalised stream."""
        norm = self.norm if normed else None
        if isinstance(self.spec.transition, Compress):
            x = self.resize_last(x, stream)
            return norm(x) if norm is not None else x
        return self.resize_last(norm(x) if norm is not None else x, stream)

    def loss(
        self,
        input_ids: Int[Tensor, "batch seq"],
        labels: Int[Tensor, "batch seq"],
        documents: Int[Tensor, "batch seq"] | None = None,
        z_loss: float = 0.0,
    ) -> Float[Tensor, ""]:
        """What training minimises, in nats per token: mean cross-entropy, z-loss, and routers' auxiliary losses.

        Args:
            labels: the next tokens; -1 is ignored.
            documents: as in `forward`.
            z_loss: weight of the mean squared log-normaliser.
        """
        total = self.total_loss(input_ids, labels, documents, z_loss)
        return total / (labels >= 0).sum() + self.auxiliary_loss()

    def total_loss(
        self,
        input_ids: Int[Tensor, "batch seq"],
        labels: Int[Tensor, "batch seq"],
        documents: Int[Tensor, "batch seq"] | None = None,
        z_loss: float = 0.0,
    ) -> Float[Tensor, ""]:
        """Cross-entropy and z-loss summed over the labels, in nats."""
        spec = self.spec
        head = Head(self.lm_head.weight, self.lm_head.bias, spec.logits_scaling, spec.final_logit_softcapping)
        x = self.hidden(input_ids, documents=documents).flatten(0, 1)
        return cross_entropy(x, head, labels.flatten(), z_loss)

    def auxiliary_loss(self) -> Float[Tensor, ""] | float:
        """Load-balance and z losses of every router at the last forward pass, weighted as the spec says."""
        routers = [module for module in self.modules() if isinstance(module, MixtureOfExperts)]
        return sum((router.spec.router_aux_loss_coef * router.auxiliary for router in routers), start=0.0)


def build_meta(spec: ModelSpec) -> Decoder:
    """The module with shapes and no memory."""
    with torch.device("meta"):
        return Decoder(spec)


def build(
    spec: ModelSpec, seed: int = 0, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Decoder:
    """The module with initial weights, a function of (spec, seed) alone."""
    model = build_meta(spec).to(dtype).to_empty(device=device)
    if spec.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    initialise(model, spec, seed)
    return model
