r"""The text-to-image transformer of Meissonic and Monetico: Flux's blocks over image tokens.

    c   = W_2 silu(W_1 [pooled text, sinusoids of the five micro-conditions]) + b           (cond_embed)
    e   = MLP(sinusoid(1000 timestep)) + MLP(c)                                             (time_text_embed)
    h   = conv_2x2(rms(conv(rms(E[ids]))))                                                  (embed, down_block)
    s   = rms(W text);  (s, h) -> double blocks -> single blocks, all modulated by e        rotary places (0, row, column)
    out = conv(rms(conv(upsampled h)))                                                      (up_block, mlm_layer)

The timestep is the number of steps that are left after the present one, as the published pipeline has it, not a share of
time. State-dict keys are the published ones. The blocks are those of diffusers; the published class is called
`Transformer2DModel`, which is not the class of that name there.

Source: Bai et al. 2024 (Meissonic, arXiv 2410.08261), files of `MeissonFlow/Meissonic` and `Collov-Labs/Monetico`.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings, TimestepEmbedding, get_timestep_embedding
from diffusers.models.normalization import RMSNorm
from diffusers.models.resnet import Downsample2D, Upsample2D
from diffusers.models.transformers.transformer_flux import (
    FluxPosEmbed,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from diffusers.models.unets.uvit_2d import ConvMlmLayer, UVit2DConvEmbed
from torch import Tensor, nn

from discrete_schedulers.models.whole_weights import WholeModelMixin

EPSILON = 1e-6
MICRO_WIDTH = 256  # of the sinusoids of each of five micro-conditions


class Resampling(nn.Module):
    """Half or twice the grid, or neither."""

    def __init__(self, width: int, downsample: bool = False, upsample: bool = False) -> None:
        super().__init__()
        shared = {"padding": 0, "kernel_size": 2, "norm_type": "rms_norm", "eps": EPSILON, "bias": False}
        shared |= {"elementwise_affine": True}
        if downsample:
            self.downsample = Downsample2D(width, use_conv=True, name="Conv2d_0", **shared)
        if upsample:
            self.upsample = Upsample2D(width, use_conv_transpose=True, name="conv", interpolate=False, **shared)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            x = part(x)
        return x


class MeissonicTransformerModel(WholeModelMixin, ConfigMixin):
    """Transformer over a grid of image tokens, told a text. Arguments are those of the published config.

    Args:
        num_layers (`int`, defaults to 14): Double blocks, where text and image have weights of their own.
        num_single_layers (`int`, defaults to 28): Single blocks.
        attention_head_dim (`int`, defaults to 128): Width of a head.
        num_attention_heads (`int`, defaults to 8): Heads.
        joint_attention_dim (`int`, defaults to 1024): Width of the text's hidden states.
        pooled_projection_dim (`int`, defaults to 1024): Width of the pooled text; must be that of all heads.
        axes_dims_rope (`tuple[int, int, int]`, defaults to `(16, 56, 56)`): Width of a head that turns by nothing, by the
            row and by the column.
        vocab_size (`int`, defaults to 8256): States, mask included.
        codebook_size (`int`, defaults to 8192): Width of the logits.
        downsample (`bool`, defaults to `True`): The blocks run on half the grid.
        upsample (`bool`, defaults to `True`): And their output is brought back to it.
        guidance_embeds (`bool`, defaults to `False`): Only `False`: guidance is two branches.

    Raises:
        ValueError: If `pooled_projection_dim` is not the width of all heads, only one of the two samplings is on, or
            `guidance_embeds` is.
    """

    @register_to_config
    def __init__(
        self,
        num_layers: int = 14,
        num_single_layers: int = 28,
        attention_head_dim: int = 128,
        num_attention_heads: int = 8,
        joint_attention_dim: int = 1024,
        pooled_projection_dim: int = 1024,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        vocab_size: int = 8256,
        codebook_size: int = 8192,
        downsample: bool = True,
        upsample: bool = True,
        guidance_embeds: bool = False,
    ) -> None:
        super().__init__()
        if guidance_embeds:
            raise ValueError("`guidance_embeds` is True, which no published checkpoint has: it must be False")
        width = num_attention_heads * attention_head_dim
        if pooled_projection_dim != width:
            raise ValueError(f"`pooled_projection_dim` is {pooled_projection_dim}; the heads are {width} wide together")
        if downsample != upsample:
            raise ValueError(f"`downsample` is {downsample}, but `upsample` is {upsample}: the grid must come back")
        self.pos_embed = FluxPosEmbed(theta=10000, axes_dim=list(axes_dims_rope))
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(width, pooled_projection_dim)
        self.context_embedder = nn.Linear(joint_attention_dim, width)
        self.transformer_blocks = nn.ModuleList(
            FluxTransformerBlock(width, num_attention_heads, attention_head_dim) for _ in range(num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            FluxSingleTransformerBlock(width, num_attention_heads, attention_head_dim) for _ in range(num_single_layers)
        )
        self.embed = UVit2DConvEmbed(width, width, vocab_size, True, EPSILON, False)
        self.mlm_layer = ConvMlmLayer(width, width, False, True, EPSILON, codebook_size)
        self.cond_embed = TimestepEmbedding(5 * MICRO_WIDTH + pooled_projection_dim, width, sample_proj_bias=False)
        self.encoder_proj_layer_norm = RMSNorm(width, EPSILON, True)
        self.project_to_hidden_norm = RMSNorm(width, EPSILON, True)
        self.project_to_hidden = nn.Linear(width, width, bias=False)
        self.project_from_hidden_norm = RMSNorm(width, EPSILON, True)
        self.project_from_hidden = nn.Linear(width, width, bias=False)
        self.down_block = Resampling(width, downsample=downsample)
        self.up_block = Resampling(width, upsample=upsample)

    def forward(
        self,
        input_ids: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_text_emb: Tensor,
        micro_conds: Tensor,
    ) -> Tensor:
        """Logits of the clean tokens.

        Args:
            input_ids (`torch.Tensor` of shape `(B, h, w)`): Noisy tokens, int64.
            timestep (`torch.Tensor` of shape `(B,)`): Steps that are left after this one.
            encoder_hidden_states (`torch.Tensor` of shape `(B, T, C)`): The text.
            pooled_text_emb (`torch.Tensor` of shape `(B, C')`): And all of it in one vector.
            micro_conds (`torch.Tensor` of shape `(B, 5)`): Width, height, crop x, crop y, aesthetic score.

        Returns:
            `torch.Tensor` of shape `(B, K, h, w)`: K is `codebook_size`.
        """
        micro = get_timestep_embedding(micro_conds.flatten(), MICRO_WIDTH, flip_sin_to_cos=True, downscale_freq_shift=0)
        pooled = torch.cat([pooled_text_emb, micro.view(len(input_ids), -1)], dim=1).to(self.dtype)
        x = self.down_block(self.embed(input_ids))  # (B, H, h', w')
        batch, width, rows, columns = x.shape
        condition = self.time_text_embed(timestep.to(x.dtype) * 1000, self.cond_embed(pooled).to(x.dtype))

        text = self.encoder_proj_layer_norm(self.context_embedder(encoder_hidden_states))  # (B, T, H)
        x = self.project_to_hidden(self.project_to_hidden_norm(x.flatten(2).mT))  # (B, h' w', H)
        places = torch.zeros(text.shape[1] + rows * columns, 3, device=x.device)
        cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(places)
        places[text.shape[1] :, 1:] = cells.view(-1, 2)
        turns = self.pos_embed(places)
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            text, x = block(x, text, condition, turns)

        x = self.project_from_hidden(self.project_from_hidden_norm(x))
        return self.mlm_layer(self.up_block(x.mT.reshape(batch, width, rows, columns)))
