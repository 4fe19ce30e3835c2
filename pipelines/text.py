"""Text to frames and back: what is known of each sample before it is written, and where its text ends.

    [start] prompt  to be written ... [end]  padding ...          one row of a frame

Start and end tokens stand there for models that were trained with them (BERT, ESM), padding where rows of one batch have
unequal lengths (`max_new_tokens`). Padding is on the right: positions then count from the first token in every row, for
networks of any position embedding, so that a row is the row alone as soon as nobody looks at the padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor

from discrete_schedulers.denoisers import AroundDenoiser, Denoiser
from discrete_schedulers.sampling import RowLogits

Message: TypeAlias = dict[str, Any]  # {"role": "user", "content": "..."}
Ends: TypeAlias = tuple[list[int], list[int]]  # ids before the text and after it


@dataclass
class Frame:
    """What is known of each sample.

    Args:
        known (`torch.Tensor` of shape `(B, L)`): Ids, -1 where a token is to be written.
        starts (`torch.Tensor` of shape `(B,)`): Where the prompt begins.
        prompt_ends (`torch.Tensor` of shape `(B,)`): Where it ends, and what is written begins; L for templates.
        lengths (`torch.Tensor` of shape `(B,)`): Tokens of the sample; padding behind.
    """

    known: Tensor
    starts: Tensor
    prompt_ends: Tensor
    lengths: Tensor

    @property
    def is_padding(self) -> Tensor:
        """Bool (B, L)."""
        return torch.arange(self.known.shape[1]) >= self.lengths[:, None]

    def repeated(self, times: int) -> Frame:
        """Each row several times."""
        fields = (self.known, self.starts, self.prompt_ends, self.lengths)
        return Frame(*(field.repeat_interleave(times, 0) for field in fields))


def special_ends(tokenizer: Any, frozen_token_ids: Sequence[int]) -> Ends:
    """The tokens that a text begins and ends with: those of the tokenizer that the model never noises.

    Args:
        tokenizer (`PreTrainedTokenizerBase`, *optional*): With `cls_token`, and `sep_token` or `eos_token`.
        frozen_token_ids (`Sequence[int]`): Of the model. Without them a text has no such tokens.
    """
    if tokenizer is None:
        return [], []
    before = [i for i in (tokenizer.cls_token_id,) if i in frozen_token_ids]
    after = [i for i in (tokenizer.sep_token_id, tokenizer.eos_token_id) if i in frozen_token_ids]
    return before, after[:1]


def prompt_rows(tokenizer: Any, prompt: str | list[str], name: str = "prompt") -> list[list[int]]:
    """Ids of each text, without special tokens added.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Any.
        prompt (`str` or `list[str]`): One or more texts.
        name (`str`, defaults to `"prompt"`): Of the argument that they are.

    Raises:
        ValueError: If these are not texts, or the tokenizer has no token for a part of one.
    """
    texts = as_list(prompt)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"`{name}` is {prompt!r}; it must be a text or a list of texts, at least one; token ids are a tensor (P, L) for "
            "`template`"
        )
    try:
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    except Exception as error:  # of the class `Exception`: a vocabulary without a token for what is unknown
        raise ValueError(f"`{name}` is {prompt!r}, which this model's tokenizer cannot read: {error}") from error


def chat_rows(tokenizer: Any, messages: list[Message] | list[list[Message]]) -> list[list[int]]:
    """Ids of each conversation by the tokenizer's chat template, up to where the reply begins.

    Raises:
        ValueError: If these are not messages, or the tokenizer has no template.
    """
    if tokenizer is None or tokenizer.chat_template is None:
        raise ValueError(
            "`messages` need a tokenizer with a chat template, which this model's has not: pass `prompt`, or set "
            "`pipe.tokenizer.chat_template`"
        )
    chats: Any = [messages] if messages and isinstance(messages[0], dict) else messages
    if not chats or not all(chat and all(isinstance(message, dict) for message in chat) for chat in chats):
        raise ValueError(
            "`messages` must be a list of dictionaries such as {'role': 'user', 'content': 'Hello'}, or a list of such lists"
        )
    return prompt_rows(
        tokenizer, [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    )


def prefix_frame(
    rows: list[list[int]], length: int | None, max_new_tokens: int | None, ends: Ends = ([], []), padding: int = 0
) -> Frame:
    """Each prompt at the start of its row.

    Args:
        rows (`list[list[int]]`): Ids of one or more prompts, of any lengths; an empty one is no prompt.
        length (`int`, *optional*): Positions of each row, prompt and ends included.
        max_new_tokens (`int`, *optional*): Instead, positions to write in each row.
        ends (`tuple[list[int], list[int]]`): Ids before the prompt, and at the end of the row.
        padding (`int`, defaults to 0): Id that stands behind shorter rows.

    Raises:
        ValueError: If a prompt does not leave at least one position free.
    """
    before, after = ends
    fixed = [len(before) + len(row) + len(after) for row in rows]
    if max_new_tokens is None:
        assert length is not None
        lengths = [length] * len(rows)
    else:
        lengths = [number + max_new_tokens for number in fixed]
    known = torch.full((len(rows), max(lengths)), padding, dtype=torch.int64)
    for ids, row, number, total in zip(known, rows, fixed, lengths, strict=True):
        if number >= total:
            special = f" and {number - len(row)} special ones" if number > len(row) else ""
            raise ValueError(f"`prompt` has {len(row)} tokens{special}; `length` {total} leaves nothing to write")
        ids[:total] = torch.tensor([*before, *row, *[-1] * (total - number), *after])
    starts = torch.full((len(rows),), len(before))
    prompt_ends = starts + torch.tensor([len(row) for row in rows])
    return Frame(known, starts, prompt_ends, torch.tensor(lengths))


def template_frame(known: Tensor) -> Frame:
    """Rows of ids (P, L), -1 where nothing is known, as they are."""
    count, length = known.shape
    whole = torch.full((count,), length)
    return Frame(known, torch.zeros_like(whole), whole, whole)


def infill_template(
    tokenizer: Any, template: str | list[str], mask_token_id: int | None, ends: Ends = ([], [])
) -> Tensor:
    """Texts with mask tokens as rows of ids.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Its mask token stands for one position each.
        template (`str` or `list[str]`): One or more texts with as many tokens each.
        mask_token_id (`int`, *optional*): The model's mask.
        ends (`tuple[list[int], list[int]]`): Ids before and after each text, where it does not have them itself.

    Returns:
        `torch.Tensor` of shape `(P, L)`: Ids, -1 at masks.

    Raises:
        ValueError: If the model has no mask, the texts differ in length, or one has no mask token.
    """
    if mask_token_id is None:
        raise ValueError("`template` needs a mask token, which a uniform process does not have: use `prompt`")
    rows = prompt_rows(tokenizer, template, "template")
    before, after = ends
    rows = [(before if row[:1] != before else []) + row + (after if row[-1:] != after else []) for row in rows]
    lengths = sorted({len(row) for row in rows})
    if len(lengths) != 1:
        raise ValueError(f"`template` has texts of {lengths} tokens; a batch needs equal lengths: call once for each")
    if any(mask_token_id not in row for row in rows):
        raise ValueError(f"`template` has a text without mask tokens ({tokenizer.mask_token!r}): nothing to fill in")
    ids = torch.tensor(rows)
    return ids.masked_fill(ids == mask_token_id, -1)


def negative_ids(
    frame: Frame, rows: list[list[int]] | None, mask_token_id: int | None, kept: Sequence[int] = ()
) -> Tensor:
    """What the unconditional branch sees in the place of what is known, (B, L), -1 where it sees the same.

    Args:
        frame (`Frame`): The B rows.
        rows (`list[list[int]]`, *optional*): Ids of negative prompts, one for all or B; they stand where the prompts do.
        mask_token_id (`int`, *optional*): Stands where nothing else does.
        kept (`Sequence[int]`): Ids that stay: start and end.

    Raises:
        ValueError: If nothing is known, a negative prompt does not fit in the place of the prompt, or there is no mask to fill
            the place with.
    """
    known = frame.known
    hides = (known >= 0) & ~frame.is_padding & ~torch.isin(known, torch.tensor([*kept], dtype=torch.int64))
    if not hides.any():
        raise ValueError("`guidance_scale` needs something to be guided by: a prompt, a template or `class_labels`")
    width = (frame.prompt_ends - frame.starts).tolist()
    each = [[]] if rows is None else rows
    if len(each) not in (1, len(width)):
        raise ValueError(
            f"`negative_prompt` has {len(each)} texts; it must have one, or one for each prompt, here {len(width)}"
        )
    ids = torch.where(hides, -1 if mask_token_id is None else mask_token_id, -1)
    for b, (start, most) in enumerate(zip(frame.starts.tolist(), width, strict=True)):
        row = each[b % len(each)]
        if len(row) > most:
            raise ValueError(
                f"a `negative_prompt` has {len(row)} tokens, its prompt {most}: it stands in the prompt's place and cannot be "
                "longer"
            )
        if mask_token_id is None and len(row) < most:
            raise ValueError(
                f"a `negative_prompt` has {len(row)} tokens, its prompt {most}: a uniform process has no mask to fill the "
                "place with, so that they must be equal; or guide by `class_labels`"
            )
        here = slice(start, start + len(row))
        ids[b, here] = torch.where(known[b, here] >= 0, torch.tensor(row, dtype=torch.int64), -1)
    return ids


def takes_argument(network: torch.nn.Module, name: str) -> bool:
    """Whether a network's `forward` names this argument."""
    return name in inspect.signature(network.forward).parameters


def end_of_text(ids: list[int], begin: int, eos_token_ids: Sequence[int]) -> int:
    """The place of the first end token from `begin` on, or the number of tokens."""
    return next((i for i in range(begin, len(ids)) if ids[i] in eos_token_ids), len(ids))


def end_ids(asked: int | list[int] | None, own: int | list[int] | None) -> list[int]:
    """The ids that end a text: those asked for, or else the model's own.

    Raises:
        ValueError: If these are not ids.
    """
    ids = asked if asked is not None else [] if own is None else own
    if not all(isinstance(i, int) for i in as_list(ids)):
        raise ValueError(f"`eos_token_id` is {ids!r}; it must be an id or a list of ids")
    return as_list(ids)


def as_list(value: Any) -> list:
    """A list as it is, anything else as a list of one."""
    return value if isinstance(value, list) else [value]


@dataclass
class ProcessedDenoiser(AroundDenoiser):
    """A denoiser whose logits pass through transformers' logits processors.

    A processor is called as in `generate`, with `(input_ids, scores)`: for a position i, `input_ids` (R, i) are the tokens
    before it *as they are now*, masks and noise among them, and `scores` (R, V) are the logits of its clean token, float32 or
    wider, `-inf` at ids that are never drawn. One call has the R rows of the batch whose logits at i are asked for: the
    positions that the scheduler chose, or all of them. So a processor that reads the tokens before (bad words of several
    tokens, repeated n-grams, a shortest length) knows those that are written already, and no more: of two tokens that are
    drawn in one step neither sees the other, and nothing looks to the right.

    What comes out replaces the logits of p(x_0 | x_t), before the scheduler's temperature and top-p. With uniform noise that is
    the law of the posterior, as `tempered="denoiser"` has it.

    Args:
        denoiser (`Denoiser`): Any.
        logits_processor (`Callable`): A `LogitsProcessorList` or one processor: `f(input_ids, scores)` -> scores.

    Raises:
        ValueError: If it cannot be called.
    """

    denoiser: Denoiser
    logits_processor: Callable[[Tensor, Tensor], Tensor]

    def __post_init__(self) -> None:
        if not callable(self.logits_processor):
            raise ValueError(
                f"`logits_processor` is a {type(self.logits_processor).__name__}; it must be a processor or a "
                "transformers.LogitsProcessorList of them"
            )

    @overload
    def __call__(self, x_t: Tensor, t: Tensor | float, positions: None = None, **conditions: Any) -> Tensor: ...
    @overload
    def __call__(self, x_t: Tensor, t: Tensor | float, positions: Tensor, **conditions: Any) -> RowLogits: ...
    def __call__(
        self, x_t: Tensor, t: Tensor | float, positions: Tensor | None = None, **conditions: Any
    ) -> Tensor | RowLogits:
        """Processed logits of p(x_0 | x_t). As [`NetworkDenoiser`]."""
        if positions is None:
            dense = self.denoiser(x_t, t, **conditions)
            columns = [self.processed(x_t[:, :i], dense[:, i]) for i in range(x_t.shape[1])]
            return torch.stack(columns, 1)
        logits = self.denoiser(x_t, t, positions, **conditions).logits
        rows, places = positions.nonzero().unbind(1)
        processed = logits.to(torch.promote_types(logits.dtype, torch.float32)).clone()
        for i in places.unique().tolist():
            here = places == i
            processed[here] = self.processed(x_t[rows[here], :i], logits[here])
        return RowLogits(processed, positions)

    def processed(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """What the processor makes of logits (R, V) behind tokens (R, i)."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return self.logits_processor(input_ids, wide.clone())  # some processors write into what they get
