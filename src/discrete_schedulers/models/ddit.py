r"""The diffusion transformer that SEDD, MDLM, SDTT, DUO, UDLM, BD3-LM and RADD share.

    x   = E[ids] (+ P[places])                                only where positions are absolute
    c   = silu(MLP(sinusoid(sigma))) (+ silu(C[y]))          only where the model is conditioned
    x  += gate_a * W_o attention(rope(W_qkv mod_a(LN(x))))    full, bidirectional, 1/sqrt(d)
    x  += gate_m * MLP(mod_m(LN(x)))                          mod(x) = x * (1 + scale) + shift
    h   = mod_f(LN(x)),  logits = W h + b

State-dict keys are the published ones (`vocab_embed.embedding`, `sigma_map.mlp.0.weight`, `blocks.0.attn_qkv.weight`,
`output_layer.linear.weight`, ...), so the checkpoints load after their prefix is taken off. Attention is
`scaled_dot_product_attention`; nothing needs a GPU. A model without time (`cond_dim=None`, RADD) has no modulation and
its norms have biases.

Sources: Peebles and Xie 2023 (DiT), Lou et al. 2024 (SEDD), Sahoo et al. 2024 (MDLM), Ou et al. 2024 (RADD).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from discrete_schedulers.models.whole_weights import WholeModelMixin, check_sizes

SINUSOID_WIDTH = 256  # fixed in every published checkpoint, whatever the hidden size
SINUSOID_BASE = ROTARY_BASE = 10_000.0
GRID_ROTARY_BASE = 100.0  # rows and columns are few: with 10,000 most pairs of a head would hardly turn


@dataclass
class DDiTOutput(BaseOutput):
    """Output of [`DDiTModel`].

    Args:
        logits (`torch.Tensor` of shape `(B, L, V)`): Raw scores of the clean token at each position, or (R, V) at the chosen
            `positions`.
        hidden_states (`torch.Tensor` of shape `(B, L, H)`, *optional*): What the head reads: `head(hidden_states)` is
            `logits`.
    """

    logits: Tensor
    hidden_states: Tensor | None = None


class LayerNorm(nn.Module):
    """Layer norm in float32 whatever the dtype of the model, with the bias optional."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.weight.float(), None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.weight.shape, scale, shift, eps=1e-5).to(x.dtype)


class TimestepEmbedder(nn.Module):
    """Total noise sigma, shape (B,), to a condition vector, shape (B, C). Cosines stand before sines."""

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOID_WIDTH, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, sigma: Tensor) -> Tensor:
        half = SINUSOID_WIDTH // 2
        frequency = SINUSOID_BASE ** -(torch.arange(half, device=sigma.device) / half)
        angle = sigma.float()[:, None] * frequency  # (B, 128)
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1)  # (B, 256)
        return self.mlp(wave.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Class label to a condition vector; the last row is the unconditional class."""

    def __init__(self, num_classes: int, cond_dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, cond_dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class TokenEmbedding(nn.Module):
    """Token table. A bare parameter, since the published key is `vocab_embed.embedding`."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(vocab_size, width) * 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding[ids]


class Rotary(nn.Module):
    """Rotary angles for positions 0 .. L-1, in row-major order where there is a grid: half of the pairs then turn by the
    row and half by the column. The buffer is kept for its published key only: it is recomputed in float32, because a
    half-precision copy of it would turn late positions by the wrong angle."""

    def __init__(self, head_dim: int, columns: int | None = None) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.columns = columns
        self.register_buffer("inv_freq", self.frequencies(torch.device("cpu")))

    def frequencies(self, device: torch.device) -> Tensor:
        width, base = (self.head_dim, ROTARY_BASE) if self.columns is None else (self.head_dim // 2, GRID_ROTARY_BASE)
        exponent = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
        return base**-exponent  # (d / 2,), or (d / 4,) for each of rows and columns

    def forward(self, length: int, device: torch.device, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if position_ids is None:
            place = torch.arange(length, device=device, dtype=torch.float32)
        else:
            place = position_ids.to(device, torch.float32)[:, None]  # (B or 1, 1, L): the same for all heads
        axes = [place] if self.columns is None else [place // self.columns, place % self.columns]
        angle = torch.cat([axis[..., None] * self.frequencies(device) for axis in axes], dim=-1)  # (..., L, d / 2)
        angle = torch.cat([angle, angle], dim=-1)  # (..., L, d): halves, not pairs, are rotated
        return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys, shape (B, heads, L, d), by their position."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x.float() * cos + turned * sin).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`x * (1 + scale) + shift` with one shift and scale per sequence, shape (B, H)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class DDiTBlock(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, cond_dim: int | None, mlp_ratio: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = LayerNorm(hidden_size, bias=cond_dim is None)
        self.attn_qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.attn_out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm2 = LayerNorm(hidden_size, bias=cond_dim is None)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, mlp_ratio * hidden_size),
            nn.GELU(approximate="tanh"),
            nn.Linear(mlp_ratio * hidden_size, hidden_size),
        )
        self.adaLN_modulation = None if cond_dim is None else nn.Linear(cond_dim, 6 * hidden_size)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        condition: Tensor | None,
        mask: Tensor | None,
        past: Any = None,
        number: int = 0,
    ) -> Tensor:
        if self.adaLN_modulation is None:
            x = x + self.attention(self.norm1(x), cos, sin, mask, past, number)
            return x + self.mlp(self.norm2(x))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition).chunk(6, dim=-1)
        attended = self.attention(modulate(self.norm1(x), shift_a, scale_a), cos, sin, mask, past, number)
        x = x + gate_a[:, None] * attended
        return x + gate_m[:, None] * self.mlp(modulate(self.norm2(x), shift_m, scale_m))

    def attention(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, past: Any = None, number: int = 0
    ) -> Tensor:
        batch, length, width = x.shape
        packed = self.attn_qkv(x).view(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4)  # each (B, heads, L, d)
        key = rotate(key, cos, sin)
        if past is not None:  # keys and values of earlier tokens come before these, which join them
            key, value = past.update(key, value, number)
        out = F.scaled_dot_product_attention(rotate(query, cos, sin), key, value, attn_mask=mask)
        return self.attn_out(out.transpose(1, 2).reshape(batch, length, width))


class DDiTFinalLayer(nn.Module):
    def __init__(self, hidden_size: int, vocab_size: int, cond_dim: int | None) -> None:
        super().__init__()
        self.norm_final = LayerNorm(hidden_size, bias=cond_dim is None)
        self.linear = nn.Linear(hidden_size, vocab_size)
        self.adaLN_modulation = None if cond_dim is None else nn.Linear(cond_dim, 2 * hidden_size)

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        x = self.norm_final(x)
        if self.adaLN_modulation is None:
            return x
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return modulate(x, shift, scale)


class DDiTModel(WholeModelMixin, ConfigMixin):
    """Bidirectional transformer over tokens, with optional time and class conditioning.

    Args:
        vocab_size (`int`): Width V of the logits, mask token included where there is one.
        hidden_size (`int`, defaults to 768): Width H.
        num_blocks (`int`, defaults to 12): Number of transformer blocks.
        num_heads (`int`, defaults to 12): Attention heads; must divide `hidden_size`.
        cond_dim (`int`, *optional*, defaults to 128): Width C of the time condition; `None` for a model without time.
        max_length (`int`, defaults to 1024): Longest sequence the model was trained on.
        num_classes (`int`, *optional*): Number of classes for class conditioning; `None` for none.
        time_conditioning (`bool`, defaults to `True`): `False` feeds sigma = 0 always, as MDLM's checkpoints want it.
        mlp_ratio (`int`, defaults to 4): Width of the MLP in units of `hidden_size`.
        absolute_positions (`bool`, defaults to `False`): Add a learned vector for each of `max_length` positions. Rotary angles
            know distances only: where all tokens are masks every position gets the same law, so a model whose sequences have
            a beginning and an end, or images, need this. No published checkpoint has it.
        grid_shape (`tuple[int, int]`, *optional*): Rows and columns of an image's tokens, in row-major order; rotary angles
            then tell rows and columns apart. `None` for a sequence.

    Raises:
        ValueError: If `num_heads` does not divide `hidden_size`, `num_classes` is given without `cond_dim`, or the heads of a
            grid are not a multiple of 4 wide.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules = ["DDiTBlock", "DDiTFinalLayer"]

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        hidden_size: int = 768,
        num_blocks: int = 12,
        num_heads: int = 12,
        cond_dim: int | None = 128,
        max_length: int = 1024,
        num_classes: int | None = None,
        time_conditioning: bool = True,
        mlp_ratio: int = 4,
        absolute_positions: bool = False,
        grid_shape: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        check_sizes(vocab_size=vocab_size, hidden_size=hidden_size, num_blocks=num_blocks, num_heads=num_heads)
        check_sizes(max_length=max_length, cond_dim=1 if cond_dim is None else cond_dim)
        if hidden_size % num_heads:
            raise ValueError(f"`hidden_size` ({hidden_size}) must be a multiple of `num_heads` ({num_heads})")
        if num_classes is not None and cond_dim is None:
            raise ValueError("`num_classes` needs `cond_dim`: a class is fed through the condition vector")
        self.vocab_embed = TokenEmbedding(vocab_size, hidden_size)
        self.position_embed = TokenEmbedding(max_length, hidden_size) if absolute_positions else None
        self.sigma_map = None if cond_dim is None else TimestepEmbedder(cond_dim)
        self.cond_map = None if num_classes is None or cond_dim is None else LabelEmbedder(num_classes, cond_dim)
        if grid_shape is not None and hidden_size // num_heads % 4:
            raise ValueError(
                f"`hidden_size` ({hidden_size}) over `num_heads` ({num_heads}) must be a multiple of 4 with `grid_shape`"
            )
        self.rotary_emb = Rotary(hidden_size // num_heads, None if grid_shape is None else grid_shape[1])
        self.blocks = nn.ModuleList(DDiTBlock(hidden_size, num_heads, cond_dim, mlp_ratio) for _ in range(num_blocks))
        self.output_layer = DDiTFinalLayer(hidden_size, vocab_size, cond_dim)

    def condition(
        self, sigma: Tensor | None, class_labels: Tensor | None, batch: int, device: torch.device
    ) -> Tensor | None:
        """The condition vector c, shape (B, C), or `None` for a model without time."""
        if class_labels is not None and self.cond_map is None:
            raise ValueError("`class_labels` were passed, but this model has no classes (`num_classes` is None)")
        if self.sigma_map is None:
            return None
        if self.config.time_conditioning and sigma is None:
            raise ValueError("`sigma` (total noise, shape (B,)) is required: this model is conditioned on time")
        if sigma is None or not self.config.time_conditioning:
            sigma = torch.zeros(batch, device=device)
        condition = F.silu(self.sigma_map(sigma.reshape(-1).expand(batch)))
        if self.cond_map is None:
            return condition
        if class_labels is None:
            raise ValueError(f"`class_labels` is required; pass {self.config.num_classes} for the unconditional class")
        return condition + F.silu(self.cond_map(torch.as_tensor(class_labels, device=device)))

    def hidden(
        self,
        input_ids: Tensor,
        sigma: Tensor | None = None,
        class_labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
    ) -> Tensor:
        """What the head reads, shape (B, L, H). Arguments as in `forward`."""
        batch, length = input_ids.shape
        cos, sin = self.rotary_emb(length, input_ids.device, position_ids)
        condition = self.condition(sigma, class_labels, batch, input_ids.device)
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask.bool()[:, None, None, :]  # (B, 1, 1, L): nobody looks at padding
        x = self.vocab_embed(input_ids)
        if self.position_embed is not None:
            if position_ids is None and length > self.config.max_length:
                raise ValueError(f"`input_ids` has {length} positions; this model has {self.config.max_length}")
            place = torch.arange(length, device=x.device)[None] if position_ids is None else position_ids.to(x.device)
            x = x + self.position_embed(place)
        for number, block in enumerate(self.blocks):
            x = block(x, cos, sin, condition, attention_mask, past_key_values, number)
        return self.output_layer(x, condition)

    def head(self, rows: Tensor) -> Tensor:
        """Logits (..., V) for hidden states (..., H): of all positions, or of chosen rows only."""
        return self.output_layer.linear(rows)

    def forward(
        self,
        input_ids: Tensor,
        sigma: Tensor | None = None,
        class_labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
    ) -> DDiTOutput | tuple:
        """Logits of the clean tokens.

        Args:
            input_ids (`torch.Tensor` of shape `(B, L)`): Noisy tokens, int64.
            sigma (`torch.Tensor` of shape `(B,)`, *optional*): Total noise, -log(alpha_t).
            class_labels (`torch.Tensor` of shape `(B,)`, *optional*): Classes, for class-conditional models; a list of one
                for all rows.
            attention_mask (`torch.Tensor`, *optional*): (B, L), 0 at padding, or broadcastable to (B, heads, L, K), with the
                keys of `past_key_values` first.
            positions (`torch.Tensor` of shape `(B, L)`, *optional*): Bool. The head is then run at these R positions only,
                and `logits` has shape (R, V), in row-major order.
            output_hidden_states (`bool`, defaults to `False`): Return what the head reads as well.
            return_dict (`bool`, defaults to `True`): Return [`DDiTOutput`] instead of a tuple.
            position_ids (`torch.Tensor` of shape `(B, L)` or `(1, L)`, *optional*): Where tokens stand; `None`: 0 to L - 1.
            past_key_values (`transformers.Cache`, *optional*): Keys and values of tokens before these; a `DynamicCache`. Those
                of these tokens are added to it.

        Returns:
            [`DDiTOutput`] or `tuple`: `logits` first.

        Raises:
            ValueError: If `sigma` or `class_labels` is missing, there are no classes to name, or a model with
                `absolute_positions` gets more of them than it has.
        """
        hidden = self.hidden(input_ids, sigma, class_labels, attention_mask, position_ids, past_key_values)
        logits = self.head(hidden if positions is None else hidden[positions])
        output = DDiTOutput(logits=logits, hidden_states=hidden if output_hidden_states else None)
        return output if return_dict else output.to_tuple()
