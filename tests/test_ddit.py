"""DDiTModel against the published key table and against a reference forward written from the formulas."""

from __future__ import annotations

import inspect
import itertools
import math
from pathlib import Path

import accelerate
import pytest
import torch
from safetensors.torch import load_file
from tiny import randomised, tiny_model
from torch import Tensor

from discrete_schedulers import DDiTModel

V, H, HEADS, BLOCKS, C = 22, 32, 4, 2, 16
IDS = torch.randint(0, V, (3, 9), generator=torch.Generator().manual_seed(5))
SIGMA = torch.tensor([0.0, 0.7, 6.9])


def published_shapes(
    vocab: int, hidden: int, blocks: int, heads: int, cond: int | None, classes: int | None = None
) -> dict[str, tuple[int, ...]]:
    """State-dict keys and shapes of the checkpoints of SEDD, MDLM, SDTT, DUO, UDLM (with time) and RADD (without)."""
    shapes = {"vocab_embed.embedding": (vocab, hidden), "rotary_emb.inv_freq": (hidden // heads // 2,)}
    norms = ["output_layer.norm_final"]
    linears = {"output_layer.linear": (vocab, hidden)}
    if cond is not None:
        linears |= {"sigma_map.mlp.0": (cond, 256), "sigma_map.mlp.2": (cond, cond)}
        linears |= {"output_layer.adaLN_modulation": (2 * hidden, cond)}
    if classes is not None:
        shapes["cond_map.embedding_table.weight"] = (classes + 1, cond)
    for i in range(blocks):
        norms += [f"blocks.{i}.norm1", f"blocks.{i}.norm2"]
        shapes[f"blocks.{i}.attn_qkv.weight"] = (3 * hidden, hidden)
        shapes[f"blocks.{i}.attn_out.weight"] = (hidden, hidden)
        linears |= {f"blocks.{i}.mlp.0": (4 * hidden, hidden), f"blocks.{i}.mlp.2": (hidden, 4 * hidden)}
        if cond is not None:
            linears[f"blocks.{i}.adaLN_modulation"] = (6 * hidden, cond)
    for name in norms:
        shapes[f"{name}.weight"] = (hidden,)
        if cond is None:
            shapes[f"{name}.bias"] = (hidden,)
    for name, shape in linears.items():
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]
    return shapes


def shapes_of(model: DDiTModel) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("cond_dim", "num_classes"), [(C, None), (None, None), (C, 5)], ids=["time", "no time", "classes"]
)
def test_keys_are_the_published_ones(cond_dim: int | None, num_classes: int | None) -> None:
    model = tiny_model(cond_dim=cond_dim, num_classes=num_classes)
    assert shapes_of(model) == published_shapes(V, H, BLOCKS, HEADS, cond_dim, num_classes)


@pytest.mark.parametrize(
    ("arguments", "keys", "parameters"),
    [
        ({}, 131, 169_627_218),
        ({"hidden_size": 1024, "num_blocks": 24, "num_heads": 16}, 251, 424_477_010),
        ({"cond_dim": None}, 126, 162_265_682),
    ],
    ids=["small", "medium", "RADD small"],
)
def test_published_sizes(arguments: dict, keys: int, parameters: int) -> None:
    """As counted in the published files. `inv_freq` is a buffer: a key of the file, not a parameter."""
    with torch.device("meta"):
        model = DDiTModel(vocab_size=50258, **arguments)
    assert len(model.state_dict()) == keys
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    size = arguments.get("hidden_size", 768), arguments.get("num_blocks", 12), arguments.get("num_heads", 12)
    assert shapes_of(model) == published_shapes(50258, *size, arguments.get("cond_dim", 128))


def linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """y_o = sum_i W_oi x_i + b_o, the bias where there is one."""
    return torch.einsum("oi,...i->...o", state[f"{name}.weight"], x) + state.get(f"{name}.bias", 0.0)


def norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
    return scaled * state[f"{name}.weight"] + state.get(f"{name}.bias", 0.0)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def turned(x: Tensor, columns: int | None = None) -> Tensor:
    """Rotary embedding of (B, L, heads, d) with complex numbers: entry j and entry j + d / 2 are one of them, and at
    position m it is multiplied by exp(i m 10000^(-2 j / d)). On a grid the first half of the numbers is multiplied by
    exp(i row 100^(-4 j / d)), the second half by the same with the column."""
    half, places = x.shape[-1] // 2, range(x.shape[1])
    angles = [[m * 10_000 ** (-j / half) for j in range(half)] for m in places]
    if columns is not None:
        rates = [100 ** (-j / (half // 2)) for j in range(half // 2)]
        angles = [[number * rate for number in divmod(m, columns) for rate in rates] for m in places]
    angle = torch.tensor(angles).double()
    number = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle)[:, None]
    return torch.cat([number.real, number.imag], -1)


def reference(
    state: dict[str, Tensor],
    ids: Tensor,
    heads: int,
    sigma: Tensor | None = None,
    labels: Tensor | None = None,
    columns: int | None = None,
    block_size: int | None = None,
) -> Tensor:
    """Logits in float64 from the state dict alone. With `sigma=None` the model has no time, with `block_size=None` every
    position sees every other one."""
    state = {key: value.double() for key, value in state.items()}
    condition = None
    if sigma is not None:
        waves = [[f(float(s) * 10_000 ** (-j / 128)) for f in (math.cos, math.sin) for j in range(128)] for s in sigma]
        condition = silu(
            linear(state, "sigma_map.mlp.2", silu(linear(state, "sigma_map.mlp.0", torch.tensor(waves).double())))
        )
    if labels is not None:
        condition = condition + silu(state["cond_map.embedding_table.weight"][labels])

    def modulation(name: str, parts: int) -> tuple[Tensor, ...]:
        return linear(state, f"{name}.adaLN_modulation", condition)[:, None].chunk(parts, -1)

    x = state["vocab_embed.embedding"][ids]
    if columns is not None:
        x = x + state["position_embed.embedding"][: ids.shape[1]]
    batch, length, hidden = x.shape
    for i in range(len({key.split(".")[1] for key in state if key.startswith("blocks.")})):
        block = f"blocks.{i}"
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (0.0, 0.0, 1.0, 0.0, 0.0, 1.0)
        if condition is not None:
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation(block, 6)
        inner = norm(state, f"{block}.norm1", x) * (1 + scale_a) + shift_a
        packed = linear(state, f"{block}.attn_qkv", inner).reshape(batch, length, 3, heads, hidden // heads)
        query, key, value = turned(packed[:, :, 0], columns), turned(packed[:, :, 1], columns), packed[:, :, 2]
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(hidden // heads)
        for q, k in itertools.product(range(length), repeat=2):
            if block_size is not None and k // block_size > q // block_size:
                scores[..., q, k] = -math.inf
        weights = torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True)
        mixed = torch.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, length, hidden)
        x = x + gate_a * linear(state, f"{block}.attn_out", mixed)
        inner = norm(state, f"{block}.norm2", x) * (1 + scale_m) + shift_m
        x = x + gate_m * linear(state, f"{block}.mlp.2", gelu_tanh(linear(state, f"{block}.mlp.0", inner)))
    x = norm(state, "output_layer.norm_final", x)
    if condition is not None:
        shift, scale = modulation("output_layer", 2)
        x = x * (1 + scale) + shift
    return linear(state, "output_layer.linear", x)


@torch.no_grad()
def test_forward_is_the_formula() -> None:
    timed, timeless, classes = tiny_model(), tiny_model(cond_dim=None), tiny_model(num_classes=5)
    labels = torch.tensor([0, 3, 5])
    for model, inputs in [(timed, (SIGMA,)), (timeless, ()), (classes, (SIGMA, labels))]:
        expected = reference(model.state_dict(), IDS, HEADS, *inputs)
        assert expected.abs().max() > 1  # the comparison is not one of zeros
        torch.testing.assert_close(model(IDS, *inputs).logits.double(), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_forward_on_a_grid_is_the_formula() -> None:
    model, labels = (
        tiny_model(num_classes=5, grid_shape=(3, 4), absolute_positions=True, max_length=12),
        torch.tensor([0, 3, 5]),
    )
    plain = published_shapes(V, H, BLOCKS, HEADS, C, 5)
    assert shapes_of(model) == plain | {"position_embed.embedding": (12, H), "rotary_emb.inv_freq": (H // HEADS // 4,)}
    expected = reference(model.state_dict(), IDS, HEADS, SIGMA, labels, columns=4)
    torch.testing.assert_close(model(IDS, SIGMA, labels).logits.double(), expected, rtol=0, atol=1e-5)
    # chosen places, in any order, are those of the grid
    order = torch.tensor([4, 0, 8, 1, 6, 2, 7, 5, 3])
    moved = model(IDS[:, order], SIGMA, labels, position_ids=order[None]).logits
    torch.testing.assert_close(moved.double(), expected[:, order], rtol=0, atol=1e-5)
    # an image that is all masks is not the same everywhere
    same = model(torch.full((1, 12), V - 1), SIGMA[:1], labels[:1]).logits[0]
    assert torch.pdist(same).min() > 1e-2


@torch.no_grad()
def test_time_and_class_change_the_logits() -> None:
    model, labels = tiny_model(num_classes=5), torch.tensor([0, 3, 5])
    logits = model(IDS, SIGMA, labels).logits
    assert (model(IDS, SIGMA + 0.5, labels).logits - logits).abs().amax((1, 2)).min() > 1e-2
    assert (model(IDS, SIGMA, labels.flip(0)).logits - logits).abs().amax((1, 2))[[0, 2]].min() > 1e-2


@torch.no_grad()
def test_without_time_conditioning_sigma_is_zero() -> None:
    model = tiny_model(time_conditioning=False)
    expected = reference(model.state_dict(), IDS, HEADS, torch.zeros(3))
    for sigma in (None, SIGMA):
        torch.testing.assert_close(model(IDS, sigma).logits.double(), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_attention_is_bidirectional() -> None:
    model, changed = tiny_model(), IDS.clone()
    changed[:, 5] = (changed[:, 5] + 1) % V
    moved = (model(changed, SIGMA).logits - model(IDS, SIGMA).logits).abs().amax(-1)  # (B, L)
    assert (moved > 1e-4).all()


@torch.no_grad()
def test_positions_matter_only_through_other_tokens() -> None:
    model = tiny_model()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    permuted = model(IDS[:, order], SIGMA).logits
    assert (permuted - model(IDS, SIGMA).logits[:, order]).abs().max() > 1e-2
    # Attention over equal values is their value, wherever it looks.
    same = model(torch.full((1, 9), 4), SIGMA[1:2]).logits
    torch.testing.assert_close(same, same[:, :1].expand_as(same), rtol=0, atol=1e-5)


@torch.no_grad()
def test_absolute_positions() -> None:
    """The vector of a place is added to its token: a model without the table, fed the sums as tokens of their own, agrees."""
    model = tiny_model(absolute_positions=True, max_length=9)
    table, tokens = model.position_embed.embedding, model.vocab_embed.embedding
    same = model(torch.full((1, 9), 4), SIGMA[1:2]).logits[0]
    assert (same[1:] - same[:-1]).abs().amax(-1).min() > 1e-2
    plain = tiny_model()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "position" not in key})
    for ids, places in ((IDS[:1], torch.arange(9)), (IDS[:1, :5], torch.tensor([7, 2, 3, 4, 8]))):
        length = len(places)
        plain.vocab_embed.embedding = torch.nn.Parameter(
            tokens[ids[0]] + table[places]
        )  # row i: what stands at place i
        expected = plain(torch.arange(length)[None], SIGMA[1:2], position_ids=places[None]).logits
        found = model(ids, SIGMA[1:2], position_ids=places[None]).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(IDS, SIGMA).logits, model(IDS, SIGMA, position_ids=torch.arange(9)[None]).logits)
    with pytest.raises(ValueError, match="`input_ids` has 10 positions; this model has 9"):
        model(torch.zeros(1, 10, dtype=torch.int64), SIGMA[:1])


@torch.no_grad()
def test_attention_mask() -> None:
    model, padded = tiny_model(), torch.ones(3, 9)
    padded[:, 6:] = 0
    short = model(IDS[:, :6], SIGMA).logits
    torch.testing.assert_close(model(IDS, SIGMA, attention_mask=padded).logits[:, :6], short, rtol=0, atol=1e-5)
    block = torch.arange(9) // 3
    causal = (block[:, None] >= block[None, :])[None, None]  # block-causal: BD3-LM
    changed = torch.cat([IDS[:, :6], (IDS[:, 6:] + 1) % V], 1)
    before, after = model(IDS, SIGMA, attention_mask=causal).logits, model(changed, SIGMA, attention_mask=causal).logits
    assert torch.equal(before[:, :6], after[:, :6])
    assert (before[:, 6:] - after[:, 6:]).abs().amax(-1).min() > 1e-4


@torch.no_grad()
def test_head_at_chosen_positions() -> None:
    model, generator = tiny_model().double(), torch.Generator().manual_seed(2)
    # float64, since in float32 a row of a product rounds otherwise among other rows
    positions = torch.rand(3, 9, generator=generator) < 0.4
    output = model(IDS, SIGMA, output_hidden_states=True)
    assert torch.equal(model.hidden(IDS, SIGMA), output.hidden_states)
    torch.testing.assert_close(
        model.head(output.hidden_states[positions]), output.logits[positions], rtol=0, atol=1e-12
    )
    chosen = model(IDS, SIGMA, positions=positions).logits
    assert chosen.shape == (int(positions.sum()), V)
    torch.testing.assert_close(chosen, output.logits[positions], rtol=0, atol=1e-12)
    assert model(IDS, SIGMA).hidden_states is None


@torch.no_grad()
def test_tuple_output() -> None:
    model = tiny_model()
    logits, hidden = model(IDS, SIGMA, output_hidden_states=True, return_dict=False)
    assert torch.equal(logits, model(IDS, SIGMA).logits)
    assert hidden.shape == (3, 9, H)
    assert len(model(IDS, SIGMA, return_dict=False)) == 1


@torch.no_grad()
def test_bfloat16() -> None:
    model = tiny_model()
    exact = model(IDS, SIGMA).logits
    angles = model.rotary_emb(1024, torch.device("cpu"))
    rough = model.to(torch.bfloat16)(IDS, SIGMA).logits
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().max() < 0.05 * exact.abs().max()
    # 1023 radians need more than the 8 bits of a rounded inv_freq
    assert all(torch.equal(a, b) for a, b in zip(angles, model.rotary_emb(1024, torch.device("cpu")), strict=True))


def test_meta_device() -> None:
    with torch.device("meta"):
        model = DDiTModel(vocab_size=V, hidden_size=H, num_blocks=BLOCKS, num_heads=HEADS, cond_dim=C, num_classes=5)
        ids, sigma = torch.empty(2, 7, dtype=torch.int64), torch.empty(2)
        labels = torch.empty(2, dtype=torch.int64)
    output = model(ids, sigma, labels, output_hidden_states=True)
    assert (output.logits.device.type, output.logits.shape) == ("meta", (2, 7, V))
    assert output.hidden_states.shape == (2, 7, H)
    assert not any(parameter.device.type != "meta" for parameter in model.parameters())


def test_grids_are_saved(tmp_path: Path) -> None:
    model = tiny_model(grid_shape=(3, 4))
    model.save_pretrained(tmp_path)
    assert torch.equal(DDiTModel.from_pretrained(tmp_path)(IDS, SIGMA).logits, model(IDS, SIGMA).logits)


def test_save_and_load(tmp_path: Path) -> None:
    model = tiny_model(num_classes=5, time_conditioning=False)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "diffusion_pytorch_model.safetensors").keys() == model.state_dict().keys()
    loaded = DDiTModel.from_pretrained(tmp_path)
    arguments = inspect.signature(DDiTModel.__init__).parameters.keys() - {"self"}
    assert {name: loaded.config[name] for name in arguments} == {name: model.config[name] for name in arguments}
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    labels = torch.tensor([0, 3, 5])
    assert torch.equal(loaded(IDS, SIGMA, labels).logits, model(IDS, SIGMA, labels).logits)
    assert DDiTModel.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


@torch.no_grad()
def test_offloaded_weights() -> None:
    """accelerate keeps the weights elsewhere and brings each module's own in for its forward only."""
    for model, inputs in [(tiny_model(time_conditioning=False), ()), (tiny_model(), (SIGMA,))]:
        expected = model(IDS, *inputs).logits
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        assert torch.equal(model(IDS, *inputs).logits, expected)


def test_gradient_reaches_every_parameter() -> None:
    model = randomised(tiny_model(num_classes=5)).train()
    logits = model(IDS, SIGMA, torch.tensor([0, 3, 5])).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS.flatten()).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert silent == []
    assert model.vocab_embed.embedding.grad[IDS.unique()].abs().amax(-1).min() > 0


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"`hidden_size` \(30\) must be a multiple of `num_heads` \(4\)"):
        tiny_model(hidden_size=30)
    with pytest.raises(ValueError, match=r"`num_heads` \(16\).*multiple of 4"):
        tiny_model(num_heads=16, grid_shape=(3, 4))
    with pytest.raises(ValueError, match="`num_classes` needs `cond_dim`"):
        tiny_model(cond_dim=None, num_classes=3)
    with pytest.raises(ValueError, match=r"`sigma`.* is required"):
        tiny_model()(IDS)
    with pytest.raises(ValueError, match="`class_labels` is required; pass 5"):
        tiny_model(num_classes=5)(IDS, SIGMA)
    with pytest.raises(ValueError, match="this model has no classes"):
        tiny_model()(IDS, SIGMA, torch.tensor([0, 1, 2]))
