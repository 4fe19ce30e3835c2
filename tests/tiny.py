"""Small real components for tests: a transformer with random weights, a word tokenizer, pipelines made of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import PreTrainedTokenizerFast

from discrete_schedulers import AncestralScheduler, DDiTModel, DiscreteDiffusionPipeline, DiscreteScheduler

WORDS = [
    *(
        "[PAD]",
        "[UNK]",
        "the",
        "a",
        "cat",
        "dog",
        "bird",
        "sat",
        "ran",
        "flew",
        "on",
        "under",
        "mat",
        "tree",
        "and",
        "then",
    ),
    *("it", "was", "red", "old", "big", "[MASK]"),
]
MASK = len(WORDS) - 1
LENGTH = 12


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """All parameters drawn anew, so that no gate, modulation or bias is zero and no norm is one.

    Matrices have variance 1 / fan-in, which keeps activations of order one; `inv_freq` and other buffers stay.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 1 / math.sqrt(parameter.shape[-1]) if parameter.dim() == 2 else 0.3
            centre = 1.0 if "norm" in name and name.endswith("weight") and parameter.dim() == 1 else 0.0
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tiny_model(seed: int = 0, **changes: Any) -> DDiTModel:
    """A transformer over `WORDS` with random weights."""
    arguments = {"vocab_size": len(WORDS), "hidden_size": 32, "num_blocks": 2, "num_heads": 4, "cond_dim": 16}
    model = DDiTModel(**(arguments | {"max_length": 32} | changes))
    randomised(model, seed)
    with torch.no_grad():
        model.output_layer.linear.weight.mul_(4)  # clear preferences: a test that mixes laws up shall see it
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One id for each of `WORDS`, split at spaces."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        clean_up_tokenization_spaces=False,
    )


def tiny_pipeline(scheduler: DiscreteScheduler | None = None, **changes: Any) -> DiscreteDiffusionPipeline:
    """Model, tokenizer and, unless given, an ancestral scheduler for the absorbing process; no progress bar."""
    if scheduler is None:
        scheduler = AncestralScheduler(vocab_size=len(WORDS), mask_token_id=MASK)
    components = {"model": tiny_model(), "scheduler": scheduler, "tokenizer": tiny_tokenizer()}
    pipe = DiscreteDiffusionPipeline(**(components | changes))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
