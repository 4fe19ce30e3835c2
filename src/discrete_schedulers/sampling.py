r"""Every random draw of the library.

A move is drawn in two stages: *which positions* move (a Bernoulli for each, or a fixed number of them), then *which token*
each of them takes, by inverting the cumulative law in float64 with one 53-bit uniform u:

    token = min { v : sum_{w <= v} p_w > u }

Uniforms are always drawn for the whole (B, L) sheet, so that the stream of a generator does not depend on what was drawn with
it, and with one generator per row a row does not depend on its batch.

Rows are read once, a few at a time, so that no copy of all logits is ever made. Weights are those of the logits' own precision
(float32 for half precision); sums are float64, but for neighbouring weights in float32, `BLOCK` of them. For float64 logits
the law is exact up to float64 rounding; for others each token's probability is within a few times 1e-6 of itself, which is
what rounding the logits to float32 does to it anyway.

The popular one-stage alternative, `argmin_v E_v / p_v` with exponential noise E over all states *and* "stay", has the same
law in exact arithmetic but not in float32, where E cannot fall below 2^-24 (Zheng et al. 2024, arXiv 2409.02908): rare
tokens lose, and the more so the more steps there are. It is here as `one_stage` for reproduction only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Generators: TypeAlias = torch.Generator | list[torch.Generator] | None
Draw: TypeAlias = Literal["exact", "one_stage_float32", "one_stage_1e-6"]
RowFunction: TypeAlias = Callable[
    [Tensor, slice], Tensor
]  # of some rows (r, V), which it may overwrite, and their places

BLOCK = 128  # neighbouring weights that are summed as they are, before float64 takes over
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

    def pick(self, sheet: Tensor) -> Tensor:
        """What stands at the rows' positions of a sheet (B, L), (R,)."""
        return sheet.flatten() if self.is_fixed else sheet[self.positions]

    def put(self, values: Tensor, sheet: Tensor) -> Tensor:
        """The sheet (B, L) with values (R,) at the chosen positions."""
        if self.is_fixed:
            return torch.where(self.positions, values.view(sheet.shape), sheet)
        return sheet.masked_scatter(self.positions, values)

    def chunks(self, size: int | None = None, writable: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """A few rows (r, V) at a time, without gradients, and their places among all.

        Args:
            size (`int`, *optional*): Numbers in each of them, about.
            writable (`bool`, defaults to `False`): Whether they must be copies, in float32 or wider. The next rows take their
                place: memory that is new is slower than the work that is done in it.
        """
        source, width = self.source.detach(), self.source.shape[-1]
        if size is None:
            size = CPU_CHUNK if source.device.type == "cpu" else DEVICE_CHUNK
        is_compiling = torch.compiler.is_compiling()  # a compiler finds its own chunks, and would write a loop out
        each = max(len(self) if is_compiling else size // width, 1)
        wide = torch.promote_types(source.dtype, torch.float32)
        has_own = writable and not is_compiling
        own = source.new_empty(min(each, len(self)) if has_own else 0, width, dtype=wide)
        raw = own if wide == source.dtype else own.new_empty(own.shape, dtype=source.dtype)
        for start in range(0, len(self), each):
            part = slice(start, start + each)
            copy = own[: len(self) - start]
            if self.places is None:
                some = source[part]
            elif has_own and len(self.places) == 1:
                some = torch.index_select(source, 0, self.places[0][part], out=raw[: len(copy)])
            else:
                some = source[tuple(place[part] for place in self.places)]
            if has_own:
                some = some if some.data_ptr() == copy.data_ptr() else copy.copy_(some)
            elif writable:
                some = some.to(wide, copy=True)
            yield part, some


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
        ValueError: If a list of generators does not have one entry per row.
    """
    if not isinstance(generator, list):
        source = torch.device(device) if generator is None else generator.device
        return torch.rand(shape, generator=generator, device=source, dtype=dtype).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"`generator` is a list of {len(generator)}, but the batch has {shape[0]} rows: one per row")
    rows = [torch.rand(shape[1:], generator=g, device=g.device, dtype=dtype).to(device) for g in generator]
    return torch.stack(rows)


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
    finite = torch.isfinite(total)
    if not on_host(total):
        torch._assert_async(finite.all(), "`model_output` has NaN, +inf or no finite entry in a row to draw from")
    elif not finite.all():
        bad, rows = int((~finite).sum()), total.numel()
        raise ValueError(f"`model_output` has NaN, +inf or no finite entry in {bad} of {rows} rows to draw from")


def positive_weights(logits: Tensor, out: Tensor | None = None) -> Tensor:
    """Weights (r, V) in proportion to exp(logits), finite, in float32 or wider; NaN in rows that have no law.

    Args:
        logits (`torch.Tensor` of shape `(r, V)`): Unnormalised log-probabilities.
        out (`torch.Tensor` of shape `(r, V)`, *optional*): Memory for them, of the same dtype; `logits` itself may be it.
    """
    if torch.compiler.is_compiling():
        out = None
    if logits.dtype == torch.float64:  # several times as fast as float64's softmax
        return torch.sub(logits, logits.amax(-1, keepdim=True), out=out).exp_()
    if out is None:
        return torch.softmax(logits, -1, dtype=torch.float32)
    return torch.softmax(logits, -1, out=out)


def row_sums(values: Tensor) -> Tensor:
    """Sums (r,) of rows (r, V), the same bits whatever other rows there are and however many threads.

    A row that is alone is summed twice: threads would share the sum of one long row, and it is rounded where they split it.
    """
    return values.sum(-1) if len(values) != 1 else torch.cat([values, values]).sum(-1)[:1]


def invert(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Exact draw by inversion.

    Args:
        weights (`torch.Tensor` of shape `(r, V)`): Not negative, in float32 or float64.
        u (`torch.Tensor` of shape `(r,)`): Uniforms in [0, 1), float64.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Drawn states (r,), int64, and the sum of the weights (r,), float64.
    """
    width = weights.shape[1]
    if width < 4 * BLOCK:
        cumulative = weights.double().cumsum(-1)
        total = cumulative[:, -1:]
        # `right=True` finds the first entry *above* the target, so a state of weight 0 is passed over.
        return torch.searchsorted(cumulative, u[:, None] * total, right=True).squeeze(-1), total.squeeze(-1)
    whole = width // BLOCK * BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1)
    rest = weights[:, whole:].sum(-1, keepdim=True)  # 0 where all blocks are whole, and then never drawn
    upper = torch.cat([sums, rest], dim=1).double().cumsum_(-1)  # (r, blocks)
    total = upper[:, -1:]
    target = u[:, None] * total
    block = torch.searchsorted(upper, target, right=True).clamp_(max=upper.shape[1] - 1)  # beyond it: NaN
    lower = torch.where(block > 0, upper.gather(1, (block - 1).clamp_(min=0)), 0.0)
    # What is left of u in the block is a uniform number too. It is below 1 but for rounding.
    left = ((target - lower) / (upper.gather(1, block) - lower)).clamp_(max=1 - 2**-53)
    place = block * BLOCK + torch.arange(BLOCK, device=weights.device)  # (r, BLOCK)
    inside = weights.gather(1, place.clamp(max=width - 1)).double().masked_fill_(place >= width, 0.0).cumsum_(-1)
    token = torch.searchsorted(inside, left * inside[:, -1:], right=True)
    return (block * BLOCK + token).squeeze(-1), total.squeeze(-1)


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
    return drawn(((part, positive_weights(some, some)) for part, some in rows.chunks(writable=True)), u)


def drawn(weights: Iterator[tuple[slice, Tensor]], u: Tensor) -> Tensor:
    """A state for each row (R,), int64, given the weights of a few rows (r, V) at a time and their places."""
    found = [invert(some, u[part]) for part, some in weights]
    if not found:
        return torch.empty(0, dtype=torch.int64, device=u.device)
    tokens, totals = (torch.cat(parts) for parts in zip(*found, strict=True))
    check_finite(totals)
    return tokens


def draw_tokens(rows: RowLogits, generator: Generators, shaped: RowFunction | None = None) -> Tensor:
    """One token for each row, from its own law.

    Args:
        rows (`RowLogits`): Laws of R positions, as logits.
        generator (`torch.Generator`, `list[torch.Generator]` or `None`): Source of randomness.
        shaped (`Callable`, *optional*): Makes of some rows of logits (r, V) in float32 or wider, which it may overwrite, and
            their places (a slice of R) the logits to draw from, which are overwritten. `None`: these logits.

    Returns:
        `torch.Tensor` of shape `(R,)`: Drawn states, int64.
    """
    u = rows.pick(uniforms(tuple(rows.positions.shape), generator, rows.positions.device))

    def weights() -> Iterator[tuple[slice, Tensor]]:
        for part, logits in rows.chunks(writable=True):
            some = logits if shaped is None else shaped(logits, part)
            yield part, positive_weights(some, some)

    return drawn(weights(), u)


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
        raise ValueError(f"`grid_shape` {grid_shape} has {height * width} cells, but the sample has {length} positions")
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
