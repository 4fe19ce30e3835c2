r"""DiffusionGemma as a network over one row of ids: an encoder that reads the prompt once, a decoder that runs a canvas.

    row      = [ prompt | canvas | padding ]        ids (B, L); the prompt is what is known before the first free position
    keys     = encoder(prompt)                      causal, once in a run
    logits_k = decoder(canvas_k, keys, logits_{k-1})

The canvas sees the prompt and all of itself, and the embedding of the law that the call before gave (self-conditioning; zeros
in the first call). The logits, soft-capped by the network, are those of p(x_0 | x_t) under uniform noise that replaces a token
with probability t: a linear schedule. Time is no input.

Source: transformers' `DiffusionGemmaForBlockDiffusion`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache


def canvas_length(network: nn.Module) -> int | None:
    """Most tokens that a network with a prompt and a canvas writes in one run; `None` for any other network."""
    config: Any = getattr(network, "config", None)
    return config.canvas_length if getattr(config, "model_type", None) == "diffusion_gemma" else None


class PromptAndCanvas(nn.Module):
    """The network with the state of one run: the prompt's keys and values, and the last prediction of each row.

    Prompts stand at the right end of the encoder's input, with padding to their left that nothing sees, and positions count
    from their first token: a row of a batch is the row alone, also in layers that keep the last tokens of a prompt only.

    Args:
        network (`torch.nn.Module`): transformers' `DiffusionGemmaForBlockDiffusion`.
        known (`torch.Tensor` of shape `(B, L)`, *optional*): Ids of all rows of the run, -1 where a token is to be written.
            The prompt of a row is what is known before its first -1; ids that are known behind it stand in the canvas. `None`:
            there is no run, and a call raises.
        is_padding (`torch.Tensor` of shape `(B, L)`, *optional*): Bool, at the right end of rows; `None`: nowhere.

    Raises:
        ValueError: If a row has no prompt, nothing to write, or more than a canvas.
    """

    def __init__(self, network: nn.Module, known: Tensor | None = None, is_padding: Tensor | None = None) -> None:
        super().__init__()
        self.network = network
        self.cache: Any = None
        self.prediction: Tensor | None = None  # (B, W, V), the last logits of each row
        self.has_prediction: Tensor | None = None  # (B,), bool
        self.known = known
        if known is None:
            return
        self.prompts = (known >= 0).long().cumprod(1).sum(1)  # (B,), tokens of each prompt
        ends = torch.full_like(self.prompts, known.shape[1]) if is_padding is None else (~is_padding).sum(1)
        self.widths = ends - self.prompts  # (B,), tokens of each canvas
        longest = canvas_length(network)
        if int(self.prompts.min()) < 1:
            raise ValueError("this model goes on from a prompt of at least one token: pass `prompt` or `messages`")
        if int(self.widths.min()) < 1:
            raise ValueError("`template` has a row with nothing to write")
        if longest is not None and int(self.widths.max()) > longest:
            raise ValueError(
                f"{int(self.widths.max())} tokens are to be written behind the prompt, but the canvas of this model has "
                f"{longest}: call with `max_new_tokens` up to that, and again with what was written as part of the prompt"
            )
        width, most = int(self.widths.max()), int(self.prompts.max())
        place = torch.arange(most, device=known.device) - (most - self.prompts)[:, None]
        self.prompt_places = place.clamp(min=0)  # (B, P), positions in the row
        self.canvas_places = self.prompts[:, None] + torch.arange(width, device=known.device)  # (B, W)
        in_canvas = self.canvas_places < ends[:, None]
        self.sees = torch.cat([place >= 0, in_canvas], dim=1)  # (B, P + W)

    def forward(self, ids: Tensor, row_ids: Tensor | None = None) -> Tensor:
        """Logits of the clean tokens.

        Args:
            ids (`torch.Tensor` of shape `(b, L)`): Tokens now, int64; the prompt as it was given.
            row_ids (`torch.Tensor` of shape `(b,)`, *optional*): Which rows of the run these are; `None`: all.

        Returns:
            `torch.Tensor` of shape `(b, L, V)`: Float32; zeros at the prompt and at padding, which are not predicted.

        Raises:
            ValueError: If there is no run.
        """
        if self.known is None:
            raise ValueError(
                f"a {type(self.network).__name__} has no logits of ids alone: it needs to know which are the prompt. Call the "
                "pipeline, or PromptAndCanvas(network, known)"
            )
        if self.cache is None:
            self.encode()
        all_rows = torch.arange(len(self.known), device=ids.device)
        rows = all_rows if row_ids is None else row_ids
        is_all = torch.equal(rows, all_rows)
        sees = self.sees[rows]
        output = self.network(
            decoder_input_ids=ids.gather(1, self.canvas_places[rows].clamp(max=ids.shape[1] - 1)),
            past_key_values=self.cache if is_all else rows_of_cache(self.cache, rows),
            decoder_attention_mask=None if bool(sees.all()) else sees,
            decoder_position_ids=self.canvas_places[rows],
            **self.last_prediction(rows, is_all),
        ).logits  # (b, W, V)
        self.remember(output, rows, is_all)
        logits = output.new_zeros(len(ids), ids.shape[1], output.shape[-1])
        for row, begin, width in zip(
            range(len(ids)), self.prompts[rows].tolist(), self.widths[rows].tolist(), strict=True
        ):
            logits[row, begin : begin + width] = output[row, :width]
        return logits

    def encode(self) -> None:
        """Run the encoder on the prompts. The whole network is called, with a canvas of one token, so that what moves its
        weights between devices sees it."""
        assert self.known is not None
        is_prompt = self.sees[:, : self.prompt_places.shape[1]]
        config: Any = self.network.config
        self.cache = DynamicCache(config=config.get_text_config(decoder=True))
        ids = self.known.gather(1, self.prompt_places)
        self.network(
            input_ids=ids,
            attention_mask=is_prompt.long(),
            position_ids=self.prompt_places,
            past_key_values=self.cache,
            decoder_input_ids=ids[:, -1:],
        )

    def last_prediction(self, rows: Tensor, is_all: bool) -> dict[str, Tensor]:
        """The network's arguments for self-conditioning: none before the first call."""
        if self.prediction is None or self.has_prediction is None:
            return {}
        said = {"self_conditioning_logits": self.prediction if is_all else self.prediction[rows]}
        has = self.has_prediction[rows]
        return said if bool(has.all()) else said | {"self_conditioning_mask": has}

    def remember(self, output: Tensor, rows: Tensor, is_all: bool) -> None:
        """Keep these logits (b, W, V) for the next call."""
        if is_all:
            self.prediction, self.has_prediction = output, torch.ones_like(rows, dtype=torch.bool)
            return
        if self.prediction is None or self.has_prediction is None:
            self.prediction = output.new_zeros(len(self.prompts), *output.shape[1:])
            self.has_prediction = torch.zeros_like(self.prompts, dtype=torch.bool)
        self.prediction[rows], self.has_prediction[rows] = output, True


def rows_of_cache(cache: Any, rows: Tensor) -> Any:
    """Some rows of keys and values; the cache itself stays."""
    some = copy.copy(cache)
    some.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in some.layers:
        layer.keys, layer.values = layer.keys[rows], layer.values[rows]
    return some
