r"""A hollow transformer: the logits at position i depend on every token but the i-th.

    forward stream    f_i  sees x_1 .. x_{i-1}           causal blocks on [start, x_1, ..., x_{L-1}]
    backward stream   b_i  sees x_{i+1} .. x_L           the same with the order reversed, on [x_2, ..., x_L, end]
    readout           r_i  = W [f_i; b_i], then cross-attention of r_i to f_j, j <= i, and b_j, j >= i;  logits_i = W norm(r_i)

Each stream is shifted by one, so nothing that r_i reads has seen x_i: at a mask the logits are those of p(x_i | the others),
and at a revealed token they are its leave-one-out law, which a corrector needs and an ordinary masked model does not have
(it sees the token that it is asked about). No r_i reads another r_j, which has seen x_i. So all positions of a noisy
sequence, masked or not, can be trained with the cross-entropy of their clean tokens, in one call.

The design of the readout is this library's. Blocks, rotary angles and initial state are those of [`DDiTModel`] without time.

Sources of the idea: Sun et al. 2023 (hollow transformer, arXiv 2211.16750), Zhao et al. 2025 (informed correctors, arXiv
2407.21243, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from discrete_schedulers.models.ddit import DDiTBlock, LayerNorm, Rotary, TokenEmbedding, rotate
from discrete_schedulers.models.whole_weights import WholeModelMixin


@dataclass
class HollowTransformerOutput(BaseOutput):
    """Output of [`HollowTransformerModel`].

    Args:
        logits (`torch.Tensor` of shape `(B, L, V)`): Raw scores of the clean token at each position given the others, or (R, V)
            at the chosen `positions`.
        hidden_states (`torch.Tensor` of shape `(B, L, H)`, *optional*): What the head reads: `head(hidden_states)` is
            `logits`.
    """

    logits: Tensor
    hidden_states: Tensor | None = None


class ReadoutBlock(nn.Module):
    """Cross-attention of the readout to both streams, then an MLP."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = LayerNorm(hidden_size, bias=True)
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm_forward = LayerNorm(hidden_size, bias=True)
        self.norm_backward = LayerNorm(hidden_size, bias=True)
        self.forward_kv = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.backward_kv = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.attn_out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm2 = LayerNorm(hidden_size, bias=True)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, mlp_ratio * hidden_size),
            nn.GELU(approximate="tanh"),
            nn.Linear(mlp_ratio * hidden_size, hidden_size),
        )

    def heads(self, x: Tensor) -> Tensor:
        """(B, L, H) as (B, heads, L, d)."""
        batch, length, width = x.shape
        return x.view(batch, length, self.num_heads, width // self.num_heads).transpose(1, 2)

    def forward(self, r: Tensor, f: Tensor, b: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        keys, values = [], []
        for packed in (self.forward_kv(self.norm_forward(f)), self.backward_kv(self.norm_backward(b))):
            key, value = packed.chunk(2, dim=-1)
            keys.append(rotate(self.heads(key), cos, sin))
            values.append(self.heads(value))
        query = rotate(self.heads(self.query(self.norm1(r))), cos, sin)
        out = F.scaled_dot_product_attention(query, torch.cat(keys, 2), torch.cat(values, 2), attn_mask=mask)
        r = r + self.attn_out(out.transpose(1, 2).reshape(r.shape))
        return r + self.mlp(self.norm2(r))


class HollowTransformerModel(WholeModelMixin, ConfigMixin):
    """Two causal streams and a readout that reads both, for masked diffusion without time.

    Args:
        vocab_size (`int`): Width V of the logits, mask token included.
        hidden_size (`int`, defaults to 768): Width H.
        num_blocks (`int`, defaults to 12): Blocks of each stream.
        num_readout_blocks (`int`, defaults to 2): Blocks of the readout.
        num_heads (`int`, defaults to 12): Attention heads; must divide `hidden_size`.
        max_length (`int`, defaults to 1024): Longest sequence the model was trained on.
        mlp_ratio (`int`, defaults to 4): Width of the MLP in units of `hidden_size`.

    Raises:
        ValueError: If `num_heads` does not divide `hidden_size`.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        hidden_size: int = 768,
        num_blocks: int = 12,
        num_readout_blocks: int = 2,
        num_heads: int = 12,
        max_length: int = 1024,
        mlp_ratio: int = 4,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"`hidden_size` ({hidden_size}) must be a multiple of `num_heads` ({num_heads})")
        self.vocab_embed = TokenEmbedding(vocab_size, hidden_size)
        self.ends = TokenEmbedding(2, hidden_size)  # before the first token, and after the last
        self.rotary_emb = Rotary(hidden_size // num_heads)
        self.forward_blocks = nn.ModuleList(
            DDiTBlock(hidden_size, num_heads, None, mlp_ratio) for _ in range(num_blocks)
        )
        self.backward_blocks = nn.ModuleList(
            DDiTBlock(hidden_size, num_heads, None, mlp_ratio) for _ in range(num_blocks)
        )
        self.merge = nn.Linear(2 * hidden_size, hidden_size)
        self.readout_blocks = nn.ModuleList(
            ReadoutBlock(hidden_size, num_heads, mlp_ratio) for _ in range(num_readout_blocks)
        )
        self.norm_final = LayerNorm(hidden_size, bias=True)
        self.linear = nn.Linear(hidden_size, vocab_size)

    def hidden(self, input_ids: Tensor) -> Tensor:
        """What the head reads, shape (B, L, H), for ids (B, L)."""
        batch, length = input_ids.shape
        cos, sin = self.rotary_emb(length, input_ids.device)
        x = self.vocab_embed(input_ids)
        start, end = self.ends(torch.arange(2, device=input_ids.device)).expand(batch, 2, -1).split(1, dim=1)
        f, b = torch.cat([start, x[:, :-1]], dim=1), torch.cat([x[:, 1:], end], dim=1)
        up_to = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()  # [i, j]: j <= i
        for forward_block, backward_block in zip(self.forward_blocks, self.backward_blocks, strict=True):
            f, b = forward_block(f, cos, sin, None, up_to), backward_block(b, cos, sin, None, up_to.T)
        r, both = self.merge(torch.cat([f, b], dim=-1)), torch.cat([up_to, up_to.T], dim=1)
        for block in self.readout_blocks:
            r = block(r, f, b, cos, sin, both)
        return self.norm_final(r)

    def head(self, rows: Tensor) -> Tensor:
        """Logits (..., V) for hidden states (..., H): of all positions, or of chosen rows only."""
        return self.linear(rows)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> HollowTransformerOutput | tuple:
        """Logits of the clean tokens, each given all other tokens.

        Args:
            input_ids (`torch.Tensor` of shape `(B, L)`): Noisy tokens, int64.
            positions (`torch.Tensor` of shape `(B, L)`, *optional*): Bool. The head is then run at these R positions only,
                and `logits` has shape (R, V), in row-major order.
            output_hidden_states (`bool`, defaults to `False`): Return what the head reads as well.
            return_dict (`bool`, defaults to `True`): Return [`HollowTransformerOutput`] instead of a tuple.

        Returns:
            [`HollowTransformerOutput`] or `tuple`: `logits` first.
        """
        hidden = self.hidden(input_ids)
        logits = self.head(hidden if positions is None else hidden[positions])
        output = HollowTransformerOutput(logits=logits, hidden_states=hidden if output_hidden_states else None)
        return output if return_dict else output.to_tuple()
