r"""The class-conditional transformer of Halton-MaskGIT.

    y   = C[class]                                             the last class is "any"
    x   = E[ids] + P, and registers R behind
    x  += a1 * W_o attention(W_q h, W_k h, W_v h)              h = mod_1(rms(x) w_1);  q and k are divided by their rms, over
    x  += a2 * W_2 (silu(W_1 h) * W_3 h)                       all heads together;     h = mod_2(rms(x) w_2)
    h   = mod_f(rms(x) w_f + b_f),  logits = E h + b           the head is tied to the token table, mask included

with mod(x) = x * (1 + scale) + shift and (shift, scale, gate) linear in silu(y), one such triple for each half of a block.
There is no time input. State-dict keys are the published ones, but for the head's weight, which is the token table.

Source: Besnier et al. 2025 (Halton scheduler for MaskGIT, arXiv 2503.17076), files of `llvictorll/Halton-MaskGIT`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from discrete_schedulers.models.ddit import DDiTOutput, modulate
from discrete_schedulers.models.whole_weights import WholeModelMixin

EPSILON = 1e-5


def over_rms(x: Tensor) -> Tensor:
    """x divided by the root of its mean square over the last axis, computed in float32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=EPSILON).to(x.dtype)


def whole(table: nn.Embedding, device: torch.device) -> Tensor:
    """A table by a call of its module: weights that are offloaded are brought in for nothing else."""
    return table(torch.arange(table.num_embeddings, device=device))


class ScaleNorm(nn.Module):
    """RMS norm with a weight, and a bias where the checkpoints have one."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.weight * over_rms(x)
        return x if self.bias is None else x + self.bias


class HaltonAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * (width // num_heads)  # 510 of 512 in the small model, which has 6 heads
        self.wq = nn.Linear(width, inner, bias=False)
        self.wk = nn.Linear(width, inner, bias=False)
        self.wv = nn.Linear(width, inner, bias=False)
        self.wo = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        projected = over_rms(self.wq(x)), over_rms(self.wk(x)), self.wv(x)
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in projected)
        out = F.scaled_dot_product_attention(query, key, value)  # (B, heads, L, d)
        return self.wo(out.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class HaltonBlock(nn.Module):
    def __init__(self, width: int, num_heads: int, inner: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.ln1 = ScaleNorm(width, bias=False)
        self.attn = HaltonAttention(width, num_heads)
        self.ln2 = ScaleNorm(width, bias=False)
        self.ff = GatedMLP(width, inner)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.mlp(condition).chunk(6, dim=-1)
        x = x + gate_1[:, None] * self.attn(modulate(self.ln1(x), shift_1, scale_1))
        return x + gate_2[:, None] * self.ff(modulate(self.ln2(x), shift_2, scale_2))


class HaltonLayers(nn.Module):
    """A list under the name that the published keys have: `transformer.layers`."""

    def __init__(self, num_layers: int, width: int, num_heads: int, inner: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(HaltonBlock(width, num_heads, inner) for _ in range(num_layers))


class HaltonFinalNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_final = ScaleNorm(width, bias=True)
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.mlp(condition).chunk(2, dim=-1)
        return modulate(self.norm_final(x), shift, scale)


class TiedHead(nn.Module):
    """Logits by the token table, which is published a second time as `head.weight`."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return F.linear(x, table, self.bias)


class HaltonMaskGITModel(WholeModelMixin, ConfigMixin):
    """Bidirectional transformer over the tokens of a square image of a class.

    Args:
        vocab_size (`int`, defaults to 16385): Width V of the logits: codes, and the mask, which is last.
        hidden_size (`int`, defaults to 768): Width H.
        num_layers (`int`, defaults to 12): Blocks.
        num_heads (`int`, defaults to 12): Attention heads, of H // `num_heads` each.
        intermediate_size (`int`, defaults to 2048): Inner width of the MLP: 8 H / 3, rounded up to a multiple of 256.
        grid_size (`int`, defaults to 16): Tokens on a side of the image.
        num_classes (`int`, defaults to 1000): Classes; their number is the id of "any".
        num_registers (`int`, defaults to 1): Tokens beside those of the image.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 16385,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        intermediate_size: int = 2048,
        grid_size: int = 16,
        num_classes: int = 1000,
        num_registers: int = 1,
    ) -> None:
        super().__init__()
        self.cls_emb = nn.Embedding(num_classes + 1, hidden_size)
        self.tok_emb = nn.Embedding(vocab_size, hidden_size)
        self.pos_emb = nn.Embedding(grid_size**2, hidden_size)
        self.reg_tokens = nn.Embedding(num_registers, hidden_size)
        self.transformer = HaltonLayers(num_layers, hidden_size, num_heads, intermediate_size)
        self.last_norm = HaltonFinalNorm(hidden_size)
        self.head = TiedHead(vocab_size)

    def forward(
        self,
        input_ids: Tensor,
        class_labels: Tensor,
        positions: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDiTOutput | tuple:
        """Logits of the clean tokens.

        Args:
            input_ids (`torch.Tensor` of shape `(B, L)`): Noisy tokens, row by row, int64; L is `grid_size` squared.
            class_labels (`torch.Tensor` of shape `(B,)`): Classes; `num_classes` is "any".
            positions (`torch.Tensor` of shape `(B, L)`, *optional*): Bool. The head is then run at these R positions only,
                and `logits` has shape (R, V), in row-major order.
            return_dict (`bool`, defaults to `True`): Return [`DDiTOutput`] instead of a tuple.

        Returns:
            [`DDiTOutput`] or `tuple`: `logits` first.

        Raises:
            ValueError: If the image has another size.
        """
        (batch, length), device = input_ids.shape, input_ids.device
        if length != self.pos_emb.num_embeddings:
            raise ValueError(f"`input_ids` has {length} tokens; this model's images have {self.pos_emb.num_embeddings}")
        condition = self.cls_emb(class_labels)  # (B, H)
        x = self.tok_emb(input_ids) + whole(self.pos_emb, device)
        x = torch.cat([x, whole(self.reg_tokens, device).expand(batch, -1, -1)], dim=1)  # (B, L + R, H)
        for block in self.transformer.layers:
            x = block(x, condition)
        hidden = self.last_norm(x[:, :length], condition)
        rows = hidden if positions is None else hidden[positions]
        output = DDiTOutput(logits=self.head(rows, whole(self.tok_emb, device)))
        return output if return_dict else output.to_tuple()
