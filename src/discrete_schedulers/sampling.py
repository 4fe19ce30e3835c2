r"""Every random draw of the library.

A move is drawn in two stages: *which positions* move (a Bernoulli for each, or a fixed number of them), then *which token*
each of them takes, by inverting the cumulative law in float64 with one 53-bit uniform u:

    token = min { v : sum_{w <= v} p_w > u }

Uniforms are always drawn for the whole (B, L) sheet, so that the stream of a generator does not depend on what was drawn with
it, and with one generator per row a row does not depend on its batch.

Rows are read once, a few at a time, so that no copy of all logits is ever made: the sums of 128 or 256 neighbouring weights are
kept, and the weights of the block that u falls into are read again (`RowWeights`). Weights are those of the logits' own
precision (float32 for half precision); sums are float64, but for those of a block. For float64 logits the law is exact up to
float64 rounding; for others each token's probability is within a few times 1e-6 of itself, which is what rounding the logits
to float32 does to it anyway.

The popular one-stage alternative, `argmin_v E_v / p_v` with exponential noise E over all states *and* "stay", has the same
law in exact arithmetic but not in float32, where E cannot fall below 2^-24 (Zheng et al. 2024, arXiv 2409.02908): rare
tokens lose, and the more so the more steps there are. It is here as `one_stage` for reproduction only.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Generators: TypeAlias = torch.Generator | list[torch.Generator] | None
Draw: TypeAlias = Literal["exact", "one_stage_float32", "one_stage_1e-6"]
RowFunction: TypeAlias = Callable[
    [Tensor, slice], Tensor
]  # of some rows (r, V), which it may overwrite, and their places

Measure: TypeAlias = Callable[
    [Tensor, slice], Tensor
]  # of weights (r, V) and their places, what is to be known (r, ...)

BLOCK, WIDE_BLOCK = 128, 256  # neighbouring weights that are summed as they are, before float64 takes over
FLOAT32_ENTROPY = 2e-5  # nats; less cannot be told from 0 with weights in float32
FLOAT64_ENTROPY = 1e-13  # nor this in float64: the logarithm of a row's sum is up to 44, and both terms are rounded
# Rows whose weights sum to more than this, or to less than its inverse, are weighed from their largest logit.
FAR = 2.0**64
WIDE = 2**14  # rows from which on an operation for each of them costs little beside its work
CPU_CHUNK = 2**19  # numbers that are worked on at once: 2 MB of float32 stay in the cache
DEVICE_CHUNK = 2**23  # 34 MB on other devices, where each chunk costs the start of its kernels


class RowLogits:
    """Logits of chosen positions only.

    Args:
        logits (`torch.Tensor` of shape `(R, V)`): One row for each chosen position, in row-major order.
        positions (`torch.Tensor` of shape `(B, L)`): Bool, with R entries true.
    """

    def __init__(self, logits: Tensor, positions: Tensor) -> None:
        self.source, self.positions = logits, positions
        self.places: tuple[Tensor, ...] | None = (
            None  # of the rows in `source`; `None`: all of its rows, one after the other
        )
        self.is_fixed = False  # there is a row for every position, chosen or not

    @classmethod
    def chosen(cls, logits: Tensor, positions: Tensor) -> RowLogits:
        """Rows of all logits (B, L, V), which are read where they stand. Where shapes must not depend on values (see
        `needs_fixed_shapes`) there is a row for each position, and those that are not chosen come to nothing."""
        rows = cls(logits, positions)
        if needs_fixed_shapes(logits):
            rows.source, rows.is_fixed = logits.flatten(0, 1), True
        elif logits.is_contiguous():
            rows.source, rows.places = logits.flatten(0, 1), (positions.flatten().nonzero().squeeze(1),)
        else:
            rows.places = positions.nonzero(as_tuple=True)
        return rows

    @classmethod
    def everywhere(cls, logits: Tensor) -> RowLogits:
        """All rows of all logits (B, L, V)."""
        rows = cls(logits.flatten(0, 1), torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device))
        rows.is_fixed = True
        return rows

    @property
    def logits(self) -> Tensor:
        """The rows, (R, V): a copy where they stand among others."""
        return self.source if self.places is None else self.source[self.places]

    def __len__(self) -> int:
        return len(self.source) if self.places is None else len(self.places[0])

    def among(self, chosen: Tensor) -> RowLogits:
        """The rows at some of these positions, bool (B, L)."""
        rows, kept = RowLogits(self.source, chosen), self.pick(chosen)
        rows.places = kept.nonzero(as_tuple=True) if self.places is None else tuple(p[kept] for p in self.places)
        return rows

    def some(self, which: Tensor) -> RowLogits:
        """The rows with these numbers, int64 (r,), as rows of no sheet."""
        rows = RowLogits(self.source, self.positions)
        rows.places = (which,) if self.places is None else tuple(place[which] for place in self.places)
        return rows

    def entries(self, columns: Tensor, part: slice) -> Tensor:
        """What stands in these columns (r, n) of some of the rows, (r, n), without gradients."""
        source = self.source.detach()
        if self.places is None:
            return source[part].gather(1, columns)
        return source[(*(place[part, None] for place in self.places), columns)]

    def pick(self, sheet: Tensor) -> Tensor:
        """What stands at the rows' positions of a sheet (B, L), (R,)."""
        return sheet.flatten() if self.is_fixed else sheet[self.positions]

    def put(self, values: Tensor, sheet: Tensor) -> Tensor:
        """The sheet (B, L) with values (R,) at the chosen positions."""
        if self.is_fixed:
            return torch.where(self.positions, values.view(sheet.shape), sheet)
        return sheet.masked_scatter(self.positions, values)

    def chunks(self, size: int | None = None, factor: float | None = None) -> Iterator[tuple[slice, Tensor]]:
        """A few rows (r, V) at a time, without gradients, and their places among all.

        Args:
            size (`int`, *optional*): Numbers in each of them, about.
            factor (`float`, *optional*): What they are multiplied by: then they are copies, in float32 or wider, and the next
                rows take their place: memory that is new is slower than the work that is done in it.
        """
        source, width = self.source.detach(), self.source.shape[-1]
        each, dtype = max((size or chunk_size(source)) // width, 1), torch.promote_types(source.dtype, torch.float32)
        if factor is None or torch.compiler.is_compiling():
            for start in range(0, len(self), each):
                part = slice(start, start + each)
                some = source[part] if self.places is None else source[tuple(place[part] for place in self.places)]
                yield part, some if factor is None else some.to(dtype) * factor
            return
        own = source.new_empty(min(each, len(self)), width, dtype=dtype)
        by_runs = width >= WIDE and on_host(source)  # one reading of each row in place of two
        raw = own if by_runs or own.dtype == source.dtype else own.new_empty(own.shape, dtype=source.dtype)
        for start in range(0, len(self), each):
            part, copy = slice(start, start + each), own[: len(self) - start]
            if self.places is None:
                multiplied(source[part], factor, copy)
            elif len(self.places) > 1:
                multiplied(source[tuple(place[part] for place in self.places)], factor, copy)
            elif not by_runs:
                chosen = torch.index_select(source, 0, self.places[0][part], out=raw[: len(copy)])
                multiplied(chosen, factor, copy)
            else:
                done = 0
                for first, count in runs(self.places[0][part].tolist()):
                    multiplied(source[first : first + count], factor, copy[done : done + count])
                    done += count
            yield part, copy


def multiplied(values: Tensor, factor: float, out: Tensor) -> None:
    """Values times a number, in the dtype of `out`."""
    if values.dtype == out.dtype:
        torch.mul(values, factor, out=out)
    else:
        out.copy_(values).mul_(factor)


def runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Numbers that follow each other: the first one, and how many there are."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and number == sum(found[-1]):
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((number, 1))
    return found


def chunk_size(values: Tensor) -> int:
    """Numbers that are worked on at once. A compiler finds its own chunks, and would write a loop out."""
    if torch.compiler.is_compiling():
        return sys.maxsize
    return CPU_CHUNK if values.device.type == "cpu" else DEVICE_CHUNK


def on_host(values: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device, and without breaking a compiled graph."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def needs_fixed_shapes(values: Tensor) -> bool:
    """Whether no shape may depend on values: in a compiled graph, while a CUDA graph is captured, and on the meta device."""
    if torch.compiler.is_compiling() or values.device.type == "meta":
        return True
    return values.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def uniforms(
    shape: tuple[int, ...], generator: Generators, device: torch.device | str, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Uniform numbers in [0, 1), drawn where the generator lives and moved to `device`.

    Args:
        shape (`tuple[int, ...]`): Shape with the batch first.
        generator (`torch.Generator`, `list[torch.Generator]` or `None`): One for all rows, one per row, or torch's own.
        device (`torch.device`): Where the result is wanted.
        dtype (`torch.dtype`, defaults to `torch.float64`): Precision: 53 random bits for float64, 24 for float32.

    Returns:
        `torch.Tensor`: Of the given shape.

    Raises:
        ValueError: If these are no generators, or a list of them does not have one entry per row.
    """
    if generator is not None:
        each = generator if isinstance(generator, list) else [generator]
        if not all(isinstance(one, torch.Generator) for one in each):
            raise ValueError(f"`generator` is {generator!r}; it must be a torch.Generator, a list of them, or None")
    if not isinstance(generator, list):
        source = torch.device(device) if generator is None else generator.device
        return torch.rand(shape, generator=generator, device=source, dtype=dtype).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"`generator` is a list of {len(generator)}, but the batch has {shape[0]} rows: one per row")
    rows = [torch.rand(shape[1:], generator=g, device=g.device, dtype=dtype).to(device) for g in generator]
    return torch.stack(rows) if rows else torch.empty(shape, dtype=dtype, device=device)


def gumbels(shape: tuple[int, ...], generator: Generators, device: torch.device | str) -> Tensor:
    """Standard Gumbel noise -log(-log u), float64 and finite. The largest of log w_i + noise_i is at i with probability
    w_i / sum w; the k largest are k draws without replacement.

    Args:
        shape (`tuple[int, ...]`): Shape with the batch first.
        generator (`torch.Generator`, `list[torch.Generator]` or `None`): One for all rows, one per row, or torch's own.
        device (`torch.device`): Where the result is wanted.

    Returns:
        `torch.Tensor`: Of the given shape.
    """
    return -(-uniforms(shape, generator, device).clamp(min=2**-54).log()).log()


def check_finite(total: Tensor) -> None:
    """Raises `ValueError` if the total weight of a row is NaN or infinite. Where the host would have to wait for the answer the
    device itself fails, with a `RuntimeError`, and nothing waits."""
    finite, cause = torch.isfinite(total), "where float16 overflows, run the network in bfloat16 or float32"
    if not on_host(total):
        torch._assert_async(
            finite.all(), f"`model_output` has NaN, +inf or no finite entry in a row to draw from; {cause}"
        )
    elif not finite.all():
        bad, rows = int((~finite).sum()), total.numel()
        raise ValueError(
            f"`model_output` has NaN, +inf or no finite entry in {bad} of {rows} rows to draw from; {cause}"
        )


def block_size(width: int) -> int:
    """Neighbours in a block of a row: a draw looks at the blocks, and then into one of them."""
    return BLOCK if width < WIDE else WIDE_BLOCK


def block_sums(weights: Tensor) -> Tensor:
    """Sums of `block_size` neighbours, and of the rest, of each row (r, V): (r, blocks)."""
    block = block_size(weights.shape[1])
    whole = weights.shape[1] // block * block
    sums = [weights[:, :whole].unflatten(1, (-1, block)).sum(-1)] if whole else []
    sums += [weights[:, whole:].sum(-1, keepdim=True)] if whole < weights.shape[1] else []
    return torch.cat(sums, dim=1) if len(sums) > 1 else sums[0]


def invert_blocks(sums: Tensor, u: Tensor, width: int, weights_at: Callable[[Tensor], Tensor]) -> Tensor:
    """Exact draw by inversion, first of a block and then of a place in it.

    Args:
        sums (`torch.Tensor` of shape `(r, blocks)`): `block_sums` of the weights.
        u (`torch.Tensor` of shape `(r,)`): Uniforms in [0, 1), float64.
        width (`int`): Number of weights V.
        weights_at (`Callable`): The weights (r, n) in columns (r, n), of which those beyond V are V - 1.

    Returns:
        `torch.Tensor` of shape `(r,)`: Drawn states, int64. A state of weight 0 is passed over.
    """
    size = block_size(width)
    upper = sums.cumsum(-1, dtype=torch.float64)  # (r, blocks); `sums` stay as they are
    target = u[:, None] * upper[:, -1:]
    # `right=True` finds the first entry *above* the target. Nothing is above it where a row has NaN or no weight at all.
    block = torch.searchsorted(upper, target, right=True).clamp_(max=upper.shape[1] - 1)
    lower = torch.where(block > 0, upper.gather(1, (block - 1).clamp_(min=0)), 0.0)
    # What is left of u in the block is a uniform number too. It is below 1 but for rounding.
    left = ((target - lower) / (upper.gather(1, block) - lower)).clamp_(max=1 - 2**-53)
    place = block * size + torch.arange(min(size, width), device=u.device)  # (r, n)
    inside = weights_at(place.clamp(max=width - 1)).double().masked_fill_(place >= width, 0.0).cumsum_(-1)
    token = torch.searchsorted(inside, left * inside[:, -1:], right=True)
    return (block * size + token).squeeze(-1).clamp_(max=width - 1)


def invert(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Exact draw by inversion.

    Args:
        weights (`torch.Tensor` of shape `(r, V)`): Not negative, in float32 or float64.
        u (`torch.Tensor` of shape `(r,)`): Uniforms in [0, 1), float64.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Drawn states (r,), int64, and the sum of the weights (r,), float64.
    """
    sums = block_sums(weights)
    tokens = invert_blocks(sums, u, weights.shape[1], lambda columns: weights.gather(1, columns))
    return tokens, sums.sum(-1, dtype=torch.float64)


@dataclass
class RowWeights:
    """Weights of rows in proportion to exp(scale * logits): what is left of them after one pass, see `weigh`.

        w(v) = 2^(factor * (logits(v) - shift)),    factor = scale / ln 2

    torch's 2^x is several times as fast as its e^x on a CPU.

    Args:
        rows (`RowLogits`): The R rows.
        factor (`float`): See above.
        without (`int`, or `torch.Tensor` of shape `(R,)`, *optional*): A column that has no weight, or one for each row.
        shift (`torch.Tensor` of shape `(R, 1)`): The largest logit of a row, or 0 where that need not be known.
        sums (`torch.Tensor` of shape `(R, blocks)`): `block_sums` of the weights.
        total (`torch.Tensor` of shape `(R,)`): The sum of the weights of a row, float64.
        found (`dict[str, torch.Tensor]`): What was asked for, (R, ...), by its names; `"power"`: sum_v w(v) log2 w(v), float64.
    """

    rows: RowLogits
    factor: float
    without: int | Tensor | None
    shift: Tensor
    sums: Tensor
    total: Tensor
    found: dict[str, Tensor]

    def at(self, columns: Tensor, part: slice | None = None, is_raw: bool = False) -> Tensor:
        """The weights in these columns (r, n) of some of the rows, (r, n), from their logits; with `is_raw` of any."""
        part = slice(None) if part is None else part  # torch 2.6 compiles no function whose default is a slice
        logits = self.rows.entries(columns, part).to(self.shift.dtype)  # a copy, whatever the dtype
        weights = logits.sub_(self.shift[part]).mul_(self.factor).exp2_()
        if self.without is None or is_raw:
            return weights
        without = self.without[part, None] if isinstance(self.without, Tensor) else self.without
        return weights.masked_fill_(columns == without, 0.0)

    def probability(self, tokens: Tensor) -> Tensor:
        """The probability of a token (R,) of each row, (R,), float64."""
        return (self.at(tokens[:, None]).squeeze(1) / self.total).clamp_(max=1.0)

    def entropy(self) -> Tensor:
        """Entropy of each row in nats, (R,), float64: log Z - sum_v w(v) log w(v) / Z with Z the sum of the weights w.

        What is below the rounding of the weights is 0, so that a token that is certain has no entropy.
        """
        entropy = self.total.log() - math.log(2) * self.found["power"] / self.total
        least = FLOAT64_ENTROPY if self.sums.dtype == torch.float64 else FLOAT32_ENTROPY
        return torch.where(entropy > least, entropy, 0.0)

    def among(self, which: Tensor) -> RowWeights:
        """Those of the rows with these numbers, int64 (r,), and nothing of what was found."""
        without = self.without[which] if isinstance(self.without, Tensor) else self.without
        rows, shift, sums = self.rows.some(which), self.shift[which], self.sums[which]
        return RowWeights(rows, self.factor, without, shift, sums, self.total[which], {})

    def check(self) -> None:
        """Raises an error if a row has no law, see `check_finite`."""
        check_finite(torch.where(self.total > 0, self.total, math.nan))

    def draw(self, u: Tensor) -> Tensor:
        """A token for each row, (R,), int64, by inversion with uniforms u (R,) in [0, 1), float64."""
        number, width = len(self.sums), self.rows.source.shape[-1]
        each = max(chunk_size(self.sums) // max(self.sums.shape[1], block_size(width)), 1)
        parts = [slice(start, start + each) for start in range(0, number, each)]

        def of(part: slice) -> Tensor:
            return invert_blocks(self.sums[part], u[part], width, lambda columns: self.at(columns, part))

        return torch.cat([torch.empty(0, dtype=torch.int64, device=u.device), *map(of, parts)])


def weigh(
    rows: RowLogits,
    scale: float = 1.0,
    without: int | Tensor | None = None,
    measures: Mapping[str, Measure] | None = None,
    shaped: RowFunction | None = None,
    with_entropy: bool = False,
) -> RowWeights:
    """One pass over rows of logits, a few at a time: the sums of their weights, and what else is asked for.

    Args:
        rows (`RowLogits`): The R rows.
        scale (`float`, defaults to 1.0): Factor of the logits: 1 / temperature.
        without (`int`, or `torch.Tensor` of shape `(R,)`, *optional*): A column that has no weight, or one for each row, int64.
        measures (`dict[str, Callable]`, *optional*): See `Measure`; they leave the weights as they are.
        shaped (`Callable`, *optional*): Makes other logits of some rows first, see `RowFunction`. What needs logits again,
            `draw` and `at`, cannot be asked for then.
        with_entropy (`bool`, defaults to `False`): Whether `entropy` can be asked for.

    Returns:
        [`RowWeights`].
    """
    factor = scale / math.log(2)
    is_free = on_host(rows.source) and shaped is None
    measures = dict(measures or {})
    shift, sums, found = scanned(rows, factor, without, measures, shaped, with_entropy, not is_free)
    total = sums.sum(-1, dtype=torch.float64)
    weights = RowWeights(rows, factor, without, shift, sums, total, found)
    if not is_free:
        return weights
    is_far = ~((total > 1 / FAR) & (total < FAR))  # NaN is far, too
    if is_far.any():
        far = is_far.nonzero().squeeze(1)
        column = without[far] if isinstance(without, Tensor) else without
        shift[far], sums[far], again = scanned(rows.some(far), factor, column, measures, shaped, with_entropy, True)
        total[far] = sums[far].sum(-1, dtype=torch.float64)
        for name, values in again.items():
            found[name][far] = values
    return weights


def scanned(
    rows: RowLogits,
    factor: float,
    without: int | Tensor | None,
    measures: Mapping[str, Measure],
    shaped: RowFunction | None,
    with_entropy: bool,
    is_shifted: bool,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """`shift`, `sums` and `found` of [`RowWeights`]."""
    source, width = rows.source.detach(), rows.source.shape[-1]
    empty = source.new_empty(0, width, dtype=torch.promote_types(source.dtype, torch.float32))
    shifts, sums = [empty[:, :1]], [block_sums(empty)]
    found = {"power": [source.new_empty(0, dtype=torch.float64)]} if with_entropy else {}
    found.update({name: [measure(empty, slice(0, 0))] for name, measure in measures.items()})
    is_raw = shaped is not None or is_shifted  # the logits themselves are needed
    for part, logits in rows.chunks(None, 1.0 if is_raw else factor):
        if isinstance(without, Tensor):
            logits.scatter_(1, without[part, None], -math.inf)
        elif without is not None:
            logits.select(-1, without).fill_(-math.inf)
        if shaped is not None:
            logits = shaped(logits, part)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if is_shifted:  # a row without a finite logit has no weight, one with NaN or +inf comes to NaN
            shifts.append(logits.amax(-1, keepdim=True).nan_to_num_(0.0, math.inf, 0.0))
            logits.sub_(shifts[-1])
        powers = logits.mul_(factor) if is_raw else logits
        if with_entropy:
            empty = torch.empty_like(powers) if len(empty) < len(powers) else empty  # the memory of the first is kept
            weights = torch.exp2(powers, out=empty[: len(powers)])
            if isinstance(without, Tensor):  # 0 * -inf would cost two more passes
                powers.scatter_(1, without[part, None], 0.0)
            elif without is not None:
                powers.select(-1, without).fill_(0.0)
            found["power"].append(mean_power(powers, weights))
        else:
            weights = powers.exp2_()
        sums.append(block_sums(weights))
        for name, measure in measures.items():
            found[name].append(measure(weights, part))
    if not is_shifted:
        shifts.append(source.new_zeros(len(rows), 1, dtype=empty.dtype))
    together = {name: torch.cat(parts) for name, parts in found.items()}
    return torch.cat(shifts), torch.cat(sums), together


def mean_power(powers: Tensor, weights: Tensor) -> Tensor:
    """sum_v w(v) log2 w(v) of rows (r, V) of weights and their logarithms, which are overwritten; float64 (r,). By blocks: the
    bits of a sum over a whole row would depend on how many rows there are."""
    product = powers.mul_(weights)
    total = block_sums(product).sum(-1, dtype=torch.float64)
    if on_host(total) and not math.isnan(total.sum()):
        return total
    return block_sums(product.nan_to_num_(0.0)).sum(-1, dtype=torch.float64)  # 0 * -inf


def categorical(logits: Tensor, u: Tensor) -> Tensor:
    """Exact draw from softmax(logits) by inversion: see the head of this file for the precision.

    Args:
        logits (`torch.Tensor` of shape `(R, V)`): Unnormalised log-probabilities; `-inf` is allowed, NaN is not.
        u (`torch.Tensor` of shape `(R,)`): Uniforms in [0, 1), float64.

    Returns:
        `torch.Tensor` of shape `(R,)`: Drawn states, int64. A state of probability 0 is never drawn.

    Raises:
        ValueError: If a row has NaN or `+inf`, or no state with positive probability.
    """
    rows = RowLogits(logits, torch.ones(1, len(logits), dtype=torch.bool, device=logits.device))
    return drawn_from(weigh(rows), u)


def drawn_from(weights: RowWeights, u: Tensor) -> Tensor:
    """A token for each row, (R,), int64, where each of them has a law."""
    weights.check()
    return weights.draw(u)


def drawn(weights: Iterator[tuple[slice, Tensor]], u: Tensor) -> Tensor:
    """A state for each row (R,), int64, given the weights of a few rows (r, V) at a time and their places."""
    found = [invert(some, u[part]) for part, some in weights]
    if not found:
        return torch.empty(0, dtype=torch.int64, device=u.device)
    tokens, totals = (torch.cat(parts) for parts in zip(*found, strict=True))
    check_finite(totals)
    return tokens


def draw_tokens(
    rows: RowLogits, generator: Generators, shaped: RowFunction | None = None, without: int | None = None
) -> Tensor:
    """One token for each row, from its own law.

    Args:
        rows (`RowLogits`): Laws of R positions, as logits.
        generator (`torch.Generator`, `list[torch.Generator]` or `None`): Source of randomness.
        shaped (`Callable`, *optional*): Makes of some rows of logits (r, V) in float32 or wider, which it may overwrite, and
            their places (a slice of R) the logits to draw from, which are overwritten. `None`: these logits.
        without (`int`, *optional*): A column that is never drawn.

    Returns:
        `torch.Tensor` of shape `(R,)`: Drawn states, int64.
    """
    u = rows.pick(uniforms(tuple(rows.positions.shape), generator, rows.positions.device))
    if shaped is None:
        return drawn_from(weigh(rows, without=without), u)
    return draw_shaped(rows, u, shaped, without)


def draw_shaped(rows: RowLogits, u: Tensor, shaped: RowFunction, without: int | None = None) -> Tensor:
    """A token for each row, (R,), int64, with uniforms u (R,), float64. Arguments as in `draw_tokens`."""
    weights = weigh(rows, without=without, measures={"token": lambda w, part: invert(w, u[part])[0]}, shaped=shaped)
    weights.check()
    return weights.found["token"]


def draw_others(rows: RowLogits, u: Tensor, own: Tensor, shaped: RowFunction | None) -> tuple[Tensor, Tensor]:
    """A token for each row that is not its own one, and the share of its law that others have.

    Args:
        rows (`RowLogits`): Laws of R positions, as logits.
        u (`torch.Tensor` of shape `(R,)`): Uniforms in [0, 1), float64.
        own (`torch.Tensor` of shape `(R,)`): The token of each row, int64.
        shaped (`Callable` or `None`): As in `draw_tokens`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Drawn states (R,), int64, of any value where others have no share, and 1 - p(own)
            (R,), float64.
    """
    if shaped is None:
        weights = weigh(rows, without=own)
        tokens, others = weights.draw(u), weights.total
        mine = weights.at(own[:, None], is_raw=True).squeeze(1).double()
    else:

        def drawn_beside(weights: Tensor, part: slice) -> Tensor:
            token, total = invert(weights.scatter(1, own[part, None], 0.0), u[part])
            return torch.stack([token.double(), total], dim=1)

        measures = {"mine": lambda w, part: w.gather(1, own[part, None]).squeeze(1), "others": drawn_beside}
        found = weigh(rows, measures=measures, shaped=shaped).found
        tokens, others, mine = found["others"][:, 0].long(), found["others"][:, 1], found["mine"].double()
    whole = mine + others
    check_finite(torch.where(whole > 0, others, math.nan))
    return tokens, 1 / (1 + mine / others)


def draw_from_law(logits: Tensor, generator: Generators, law: RowFunction) -> Tensor:
    """One state for every position, from a law that is worked out for a few positions at a time.

    Args:
        logits (`torch.Tensor` of shape `(B, L, V)`): Logits, of all positions.
        generator (`torch.Generator`, `list[torch.Generator]` or `None`): Source of randomness.
        law (`Callable`): Makes of some rows of logits (r, V) and their places (a slice of B * L) probabilities (r, V).

    Returns:
        `torch.Tensor` of shape `(B, L)`: Drawn states, int64.
    """
    rows = RowLogits.everywhere(logits)
    u = uniforms(tuple(logits.shape[:2]), generator, logits.device).flatten()
    size = CPU_CHUNK // 4 if logits.device.type == "cpu" else DEVICE_CHUNK // 4  # laws are float64, and several
    return drawn(((part, law(some, part)) for part, some in rows.chunks(size)), u).view(logits.shape[:2])


def draw_states(law: Tensor, generator: Generators, draw: Draw = "exact") -> Tensor:
    """One state for every position from a full transition law.

    Args:
        law (`torch.Tensor` of shape `(B, L, V)`): Probabilities (or non-negative weights) of the next state.
        generator (`torch.Generator`, `list[torch.Generator]` or `None`): Source of randomness.
        draw (`str`, defaults to `"exact"`): `"exact"`, or one of the published float32 races: see `one_stage`.

    Returns:
        `torch.Tensor` of shape `(B, L)`: Drawn states, int64.
    """
    if draw == "exact":
        return draw_from_law(law, generator, lambda weights, _: weights.double())
    check_finite(law.sum(-1))
    noise = uniforms(tuple(law.shape), generator, law.device, torch.float32)
    return one_stage(law, noise, draw)


def one_stage(law: Tensor, noise: Tensor, draw: Draw) -> Tensor:
    """The exponential race of published code, in float32: `argmin_v E_v / p_v`. For reproduction: its law is not `law`.

    Args:
        law (`torch.Tensor` of shape `(..., V)`): Probabilities of the next state, "stay" among them.
        noise (`torch.Tensor` of shape `(..., V)`): float32 uniforms.
        draw (`str`): `"one_stage_float32"`: E = 1e-10 - log(1e-10 + u) (SEDD, MDLM, RADD), or `"one_stage_1e-6"`:
            E = 1e-6 - log(1e-6 + (1 - 1e-6) u) (JYS, LSD).

    Returns:
        `torch.Tensor` of shape `(...)`: Drawn states, int64.
    """
    if draw == "one_stage_float32":
        exponential = 1e-10 - (noise + 1e-10).log()  # the 1e-10 are below the grid of `noise`, but for u = 0
    else:
        exponential = 1e-6 - (1e-6 + (1 - 1e-6) * noise).log()
    return (law.float() / exponential).argmax(-1)


def bernoulli_subset(is_eligible: Tensor, probability: Tensor | float, generator: Generators) -> Tensor:
    """Each eligible position on its own with the given probability.

    Args:
        is_eligible (`torch.Tensor` of shape `(B, L)`): Bool.
        probability (`torch.Tensor` or `float`): In [0, 1], broadcastable to (B, L).
        generator (`torch.Generator`, `list[torch.Generator]` or `None`): Source of randomness.

    Returns:
        `torch.Tensor` of shape `(B, L)`: Bool, a subset of `is_eligible`.
    """
    return is_eligible & (uniforms(tuple(is_eligible.shape), generator, is_eligible.device) < probability)


def check_count(is_eligible: Tensor, count: Tensor) -> None:
    """Raises `ValueError` if a count is negative or larger than the number of eligible positions of its row; nothing where the
    host would have to wait for the answer."""
    available = is_eligible.sum(1)
    if on_host(count) and ((count < 0) | (count > available)).any():
        raise ValueError(f"`count` is {count.tolist()}, allowed are 0 to {available.tolist()} in these rows")


def top_subset(is_eligible: Tensor, count: Tensor, score: Tensor) -> Tensor:
    """Exactly `count` eligible positions of each row: those with the highest score, the left ones first among equals.

    Args:
        is_eligible (`torch.Tensor` of shape `(B, L)`): Bool.
        count (`torch.Tensor` of shape `(B,)`): Int64, at most the number of eligible positions of the row.
        score (`torch.Tensor` of shape `(B, L)`): Any finite numbers.

    Returns:
        `torch.Tensor` of shape `(B, L)`: Bool, with `count` entries true in each row.

    Raises:
        ValueError: If a count is negative or larger than the number of eligible positions.
    """
    check_count(is_eligible, count)
    ranked = score.double().masked_fill(~is_eligible, -math.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(ranked).scatter_(
        1, ranked, torch.arange(ranked.shape[1], device=ranked.device).expand_as(ranked)
    )
    return rank < count[:, None]


def uniform_subset(is_eligible: Tensor, count: Tensor, generator: Generators) -> Tensor:
    """Exactly `count` of the eligible positions of each row, every such subset equally likely.

    Args:
        is_eligible (`torch.Tensor` of shape `(B, L)`): Bool.
        count (`torch.Tensor` of shape `(B,)`): Int64, at most the number of eligible positions of the row.
        generator (`torch.Generator`, `list[torch.Generator]` or `None`): Source of randomness.

    Returns:
        `torch.Tensor` of shape `(B, L)`: Bool, with `count` entries true in each row.

    Raises:
        ValueError: If a count is negative or larger than the number of eligible positions.
    """
    return top_subset(is_eligible, count, uniforms(tuple(is_eligible.shape), generator, is_eligible.device))


def spread_subset(
    is_eligible: Tensor, count: Tensor, generator: Generators, grid_shape: tuple[int, int] | None = None
) -> Tensor:
    """Exactly `count` eligible positions of each row, far from what is known and from each other.

    Farthest-point sampling on the ring of positions (or the torus of a grid): each pick has the largest distance to all
    positions that are not eligible or already picked; ties go by one random order of the positions. Starting with nothing
    known every position is equally likely at every rank, and on a ring of 2^k positions each power of two is evenly spaced.

    Args:
        is_eligible (`torch.Tensor` of shape `(B, L)`): Bool.
        count (`torch.Tensor` of shape `(B,)`): Int64, at most the number of eligible positions of the row.
        generator (`torch.Generator`, `list[torch.Generator]` or `None`): Source of randomness.
        grid_shape (`tuple[int, int]`, *optional*): (height, width) with height * width = L; `None` for a sequence.

    Returns:
        `torch.Tensor` of shape `(B, L)`: Bool, with `count` entries true in each row.

    Raises:
        ValueError: If `grid_shape` does not hold L positions, or a count is negative or larger than the number of eligible
            positions.
    """
    check_count(is_eligible, count)
    batch, length = is_eligible.shape
    height, width = grid_shape or (1, length)
    if height * width != length:
        raise ValueError(
            f"`grid_shape` {grid_shape} has {height * width} cells, but the sample has {length} positions: they must be equal"
        )
    device = is_eligible.device
    noise = uniforms((batch, length), generator, device)  # breaks ties: squared distances are whole numbers
    place = torch.arange(length, device=device)
    row, column = place // width, place % width
    distance = torus_distance(~is_eligible.view(batch, height, width)).view(batch, length)
    chosen = torch.zeros_like(is_eligible)
    for pick in range(int(count.max()) if batch else 0):
        score = (distance + noise).masked_fill(~is_eligible | chosen, -1.0)
        best = score.argmax(1, keepdim=True)  # (B, 1)
        chosen |= (place == best) & (pick < count)[:, None]
        away = ring(row - best // width, height) ** 2 + ring(column - best % width, width) ** 2
        distance = torch.minimum(distance, away.double())
    return chosen


def ring(offset: Tensor, size: int) -> Tensor:
    """Distance of two places of a ring of `size` places, given their difference."""
    offset = offset.abs() % size
    return torch.minimum(offset, size - offset)


def torus_distance(is_source: Tensor) -> Tensor:
    """Squared distance of each cell, shape (B, H, W), to the nearest source on the torus; the same large number everywhere
    in a row without one. Separable: along the width first, then the smallest sum over the height."""
    _, height, width = is_source.shape
    along = nearest_on_ring(is_source).double() ** 2  # (B, H, W)
    farther_than_all = float(height**2 + width**2)
    along = torch.where(is_source.any(-1, keepdim=True), along, farther_than_all)
    step = torch.arange(height, device=is_source.device)
    across = ring(step[:, None] - step[None, :], height).double() ** 2  # (H, H)
    distance = (along[:, None] + across[None, :, :, None]).amin(2)
    return distance.clamp(max=farther_than_all)


def nearest_on_ring(is_source: Tensor) -> Tensor:
    """Distance to the nearest source along the last axis, on a ring; twice its size where there is none."""
    size = is_source.shape[-1]
    far = 2 * size
    place = torch.arange(3 * size, device=is_source.device)  # three turns, so that both sides are seen
    unrolled = torch.cat([is_source] * 3, dim=-1)
    before = torch.where(unrolled, place, -far).cummax(-1).values
    after = torch.where(unrolled, place, 5 * size).flip(-1).cummin(-1).values.flip(-1)
    nearest = torch.minimum(place - before, after - place)[..., size : 2 * size]
    return nearest.clamp(max=far)
