"""What people fork: a GPT-2 style model and its plain training step, written from its description with torch's own layers.

Learned positions, pre-norm blocks without biases, exact GELU, fused attention, tied head, cross-entropy over all positions;
torch's default AdamW (0.9, 0.95) with decay on matrices, clipping at 1, batches sliced one by one from a memory map.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.gelu = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, seq, width]."""
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).split(width, 2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).contiguous().view(batch, length, width))
        return x + self.down(self.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    """The whole model; `forward` gives the mean cross-entropy."""

    def __init__(self, vocabulary: int, context: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                writer = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, 0.0, 0.02 / ((2 * layers) ** 0.5 if writer else 1.0))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """ids, labels: [batch, seq]."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1), ignore_index=-1)


class Loop:
    """One training step at a time, as the plain script takes it."""

    def __init__(self, model: GPT, data: np.ndarray, sequences: int, context: int, bfloat16: bool, rate: float) -> None:
        self.model, self.data, self.sequences, self.context = model, data, sequences, context
        decayed = [p for p in model.parameters() if p.ndim >= 2]
        others = [p for p in model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            lr=rate,
            betas=(0.9, 0.95),
        )
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=bfloat16)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Random windows, sliced one by one."""
        starts = torch.randint(len(self.data) - self.context, (self.sequences,)).tolist()
        ids = torch.stack([torch.from_numpy(self.data[i : i + self.context].astype(np.int64)) for i in starts])
        labels = torch.stack(
            [torch.from_numpy(self.data[i + 1 : i + 1 + self.context].astype(np.int64)) for i in starts]
        )
        return ids, labels

    def step(self, batch: tuple[Tensor, Tensor] | None = None) -> float:
        """Forward, backward, clip, update; the loss."""
        ids, labels = batch or self.batch()
        with self.autocast:
            loss = self.model(ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()
