"""The whole model: embedding, layers along the residual stream, final norm, head. And its initial weights, in one place."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from scantling.model.attention import Attention, LayerCache
from scantling.model.ffn import BlockDiagonal, feed_forward
from scantling.model.stream import Stream
from scantling.spec import CarryForward, LayerSpec, ModelSpec, RMSNorm


class Norm(nn.Module):
    """RMSNorm over the last axis with a learned gain."""

    def __init__(self, spec: RMSNorm, width: int) -> None:
        super().__init__()
        self.eps = spec.eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)), all at this layer's width."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.input_layernorm = Norm(spec.norm, spec.hidden_size)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = Norm(spec.norm, spec.hidden_size)
        self.mlp = feed_forward(spec.ffn, spec.hidden_size)

    def forward(
        self, x: Float[Tensor, "batch seq width"], past: LayerCache | None = None
    ) -> Float[Tensor, "batch seq width"]:
        x = x + self.self_attn(self.input_layernorm(x), past)
        return x + self.mlp(self.post_attention_layernorm(x))


class Cache:
    """Key/value caches of every layer, for `batch` sequences of up to `capacity` positions."""

    def __init__(
        self,
        spec: ModelSpec,
        batch: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.layers = [LayerCache(layer, batch, capacity, torch.device(device), dtype) for layer in spec.layers]

    @property
    def length(self) -> int:
        """Positions cached so far."""
        return self.layers[0].length


class Decoder(nn.Module):
    """A decoder-only language model as its spec says. Parameter names are Hugging Face's (Llama)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.embedding_size)
        self.layers = nn.ModuleList(Layer(layer) for layer in spec.layers)
        self.norm = Norm(spec.final_norm, spec.layers[-1].hidden_size)
        self.lm_head = nn.Linear(spec.unembedding_size, spec.vocab_size, bias=False)
        if spec.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self, input_ids: Int[Tensor, "batch seq"], cache: Cache | None = None
    ) -> Float[Tensor, "batch seq vocab"]:
        """Logits at every given position; with `cache`, the positions continue the cached ones."""
        x, stream = self.embed_tokens(input_ids), Stream(carry=isinstance(self.spec.transition, CarryForward))
        for index, (layer, spec) in enumerate(zip(self.layers, self.spec.layers, strict=True)):
            x = layer(stream.resize(x, spec.hidden_size), cache.layers[index] if cache else None)
        # Carried coordinates at the head come from the un-normalised stream, and `zero` carries there too.
        stream.carry = True
        return self.lm_head(stream.resize(self.norm(x), self.spec.unembedding_size))

    def loss(self, input_ids: Int[Tensor, "batch seq"], labels: Int[Tensor, "batch seq"]) -> Float[Tensor, ""]:
        """Mean cross-entropy in nats per token; logits are compared in float32."""
        logits = self(input_ids)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


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
    initialise(model, seed)
    return model


@torch.no_grad()
def initialise(model: Decoder, seed: int) -> None:
    """Set every weight, drawn on the CPU in float32 in the order of `named_parameters`.

    | parameter | distribution |
    |---|---|
    | embedding, head | N(0, 1/width) |
    | matrices | N(0, 1/fan_in) |
    | writers into the stream (`o_proj`, last factor of `down_proj`) | N(0, 1/fan_in)/sqrt(2 x layers) |
    | biases | 0 |
    | norm gains | 1 |

    The spread follows each matrix's own fan-in, so layers of different widths start alike (the sqrt(h/d_l) rule of
    arXiv 2606.18246 section 3 up to a constant).
    """
    generator = torch.Generator().manual_seed(seed)
    depth_scale = (2 * model.spec.num_hidden_layers) ** -0.5
    for name, module in model.named_modules():
        if isinstance(module, Norm):
            module.weight.fill_(1.0)
        elif isinstance(module, nn.Linear | nn.Embedding | BlockDiagonal):
            weight = module.weight
            if name == "lm_head" and model.spec.tie_word_embeddings:
                continue
            spread = weight.shape[-1] ** -0.5
            if name.endswith((".o_proj", ".down_proj", ".down_proj.up")):
                spread *= depth_scale
            weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            bias.zero_()
