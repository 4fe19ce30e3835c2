"""Text to token templates: ids where something is known, -1 where nothing is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def prefix_template(tokenizer: Any, prompt: str | list[str], length: int) -> Tensor:
    """Each prompt at the start of `length` positions.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Without special tokens added.
        prompt (`str` or `list[str]`): One or more texts, of any lengths.
        length (`int`): Positions L of each row.

    Returns:
        `torch.Tensor` of shape `(P, L)`: Ids, -1 after the prompt.

    Raises:
        ValueError: If a prompt does not leave at least one position free.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    rows = torch.full((len(prompts), length), -1, dtype=torch.int64)
    for row, text in zip(rows, prompts, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= length:
            raise ValueError(f"`prompt` {text[:40]!r} has {len(ids)} tokens; `length` {length} leaves nothing to write")
        row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return rows


def infill_template(tokenizer: Any, template: str | list[str], mask_token_id: int | None) -> Tensor:
    """Texts with mask tokens as rows of ids.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Its mask token stands for one position each.
        template (`str` or `list[str]`): One or more texts with as many tokens each.
        mask_token_id (`int`, *optional*): The model's mask.

    Returns:
        `torch.Tensor` of shape `(P, L)`: Ids, -1 at masks.

    Raises:
        ValueError: If the model has no mask, the texts differ in length, or one has no mask token.
    """
    if mask_token_id is None:
        raise ValueError("`template` needs a mask token, which a uniform process does not have: use `prompt`")
    templates = [template] if isinstance(template, str) else template
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in templates]
    lengths = sorted({len(row) for row in rows})
    if len(lengths) != 1:
        raise ValueError(f"`template` has texts of {lengths} tokens; a batch needs equal lengths: call once for each")
    if any(mask_token_id not in row for row in rows):
        raise ValueError(f"`template` has a text without mask tokens ({tokenizer.mask_token!r}): nothing to fill in")
    ids = torch.tensor(rows)
    return ids.masked_fill(ids == mask_token_id, -1)
