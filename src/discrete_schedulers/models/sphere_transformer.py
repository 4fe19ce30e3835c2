r"""A transformer that reads points of a sphere instead of tokens: the DDiT's blocks behind a linear map.

    x = W sqrt(V) X_t + P[places],    c = silu(MLP(sinusoid(1000 t))),    the blocks and the head of ddit.py

Where X_t is a corner, W is a table of embeddings. For RDLM (Jo and Hwang 2025, arXiv 2502.11564), whose network of this kind
does not read the mask's coordinate and knows distances only; here it is read, and places are learned, see [`DDiTModel`].
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from discrete_schedulers.models.ddit import (
    DDiTBlock,
    DDiTFinalLayer,
    DDiTOutput,
    Rotary,
    TimestepEmbedder,
    TokenEmbedding,
)

TIME_UNITS = 1000.0  # of the sinusoids: their fastest turns once in a 160th of the run


class SphereTransformerModel(ModelMixin, ConfigMixin):
    """Bidirectional transformer from points of the sphere of V states, and time, to logits of the clean tokens.

    Args:
        vocab_size (`int`): States V, the mask included where there is one.
        hidden_size (`int`, defaults to 128): Width H.
        num_blocks (`int`, defaults to 4): Number of transformer blocks.
        num_heads (`int`, defaults to 4): Attention heads; must divide `hidden_size`.
        cond_dim (`int`, defaults to 64): Width of the time condition.
        max_length (`int`, defaults to 64): Longest sequence.
        mlp_ratio (`int`, defaults to 4): Width of the MLP in units of `hidden_size`.

    Raises:
        ValueError: If `num_heads` does not divide `hidden_size`.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules = ["DDiTBlock", "DDiTFinalLayer"]

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        hidden_size: int = 128,
        num_blocks: int = 4,
        num_heads: int = 4,
        cond_dim: int = 64,
        max_length: int = 64,
        mlp_ratio: int = 4,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"`hidden_size` ({hidden_size}) must be a multiple of `num_heads` ({num_heads})")
        self.point_embed = nn.Linear(vocab_size, hidden_size)
        self.position_embed = TokenEmbedding(max_length, hidden_size)
        self.time_map = TimestepEmbedder(cond_dim)
        self.rotary_emb = Rotary(hidden_size // num_heads)
        self.blocks = nn.ModuleList(DDiTBlock(hidden_size, num_heads, cond_dim, mlp_ratio) for _ in range(num_blocks))
        self.output_layer = DDiTFinalLayer(hidden_size, vocab_size, cond_dim)
        for name, parameter in self.named_parameters():  # blocks start open and unmodulated, the head as a uniform law
            if "adaLN_modulation" in name:
                nn.init.zeros_(parameter)
        for block in self.blocks:
            for gate in cast(DDiTBlock, block).adaLN_modulation.bias.data.chunk(6)[2::3]:  # type: ignore[union-attr]
                gate.fill_(1.0)
        nn.init.zeros_(self.output_layer.linear.weight)
        nn.init.zeros_(self.output_layer.linear.bias)

    def forward(self, sample: Tensor, timestep: Tensor | float, return_dict: bool = True) -> DDiTOutput | tuple:
        """Logits of the clean tokens.

        Args:
            sample (`torch.Tensor` of shape `(B, L, V)`): Points X_t of the sphere, of the model's dtype.
            timestep (`torch.Tensor` of shape `(B,)` or a number): Times in [0, 1], 1 for noise.
            return_dict (`bool`, defaults to `True`): Return [`~models.ddit.DDiTOutput`] instead of a tuple.

        Returns:
            [`~models.ddit.DDiTOutput`] or `tuple`: `logits` (B, L, V) first.

        Raises:
            ValueError: If `sample` is not (B, L, V) of this model's V, or longer than `max_length`.
        """
        width, longest = self.config.vocab_size, self.config.max_length
        if sample.dim() != 3 or sample.shape[-1] != width or sample.shape[1] > longest:
            raise ValueError(
                f"`sample` has shape {tuple(sample.shape)}; it must be (B, L, {width}), with L of at most {longest}"
            )
        batch, length = sample.shape[:2]
        t = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(batch)
        condition = F.silu(self.time_map(TIME_UNITS * t))
        x = self.point_embed(width**0.5 * sample) + self.position_embed(torch.arange(length, device=sample.device))
        cos, sin = self.rotary_emb(length, sample.device)
        for block in self.blocks:
            x = block(x, cos, sin, condition, None)
        output = DDiTOutput(logits=self.output_layer.linear(self.output_layer(x, condition)))
        return output if return_dict else output.to_tuple()
