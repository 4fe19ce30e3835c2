"""HollowTransformerModel: no position sees its own token, every position sees all others."""

from __future__ import annotations

import inspect
from pathlib import Path

import accelerate
import pytest
import torch
from safetensors.torch import load_file
from tiny import MASK, WORDS, randomised, seeded, tiny_pipeline

from discrete_schedulers import DDiTModel, DiscreteDiffusionPipeline, HollowTransformerModel

V, H, HEADS, L = 22, 32, 4, 9
IDS = torch.randint(0, V, (3, L), generator=seeded(5))


def hollow_model(**changes: int) -> HollowTransformerModel:
    arguments = {"vocab_size": V, "hidden_size": H, "num_blocks": 2, "num_readout_blocks": 2, "num_heads": HEADS}
    return randomised(HollowTransformerModel(**(arguments | {"max_length": 32} | changes)))


@torch.no_grad()
@pytest.mark.parametrize("depths", [(2, 2), (1, 1), (0, 1), (3, 0)])
def test_the_logits_of_a_position_do_not_depend_on_its_token(depths: tuple[int, int]) -> None:
    """Bit for bit; while every other position sees it. Without streams' blocks the readout alone spreads it; without
    readout blocks the streams do."""
    model = hollow_model(num_blocks=depths[0], num_readout_blocks=depths[1])
    before = model(IDS).logits
    assert before.shape == (3, L, V)
    for place in range(L):
        for shift in (1, 7):
            changed = IDS.clone()
            changed[:, place] = (changed[:, place] + shift) % V
            moved = (model(changed).logits - before).abs().amax(-1)  # (B, L)
            assert (moved[:, place] == 0).all()
            assert (moved[:, [i for i in range(L) if i != place]] > 1e-5).all()


@torch.no_grad()
def test_an_ordinary_transformer_sees_its_own_token() -> None:
    """What the test above would find."""
    model = randomised(DDiTModel(V, hidden_size=H, num_blocks=1, num_heads=HEADS, cond_dim=None))
    changed = IDS.clone()
    changed[:, 4] = (changed[:, 4] + 1) % V
    assert (model(changed).logits - model(IDS).logits).abs().amax(-1)[:, 4].min() > 1e-3


@torch.no_grad()
def test_order_matters_and_both_ends_have_one() -> None:
    model = hollow_model()
    order = torch.randperm(L, generator=seeded(1))
    assert (model(IDS[:, order]).logits - model(IDS).logits[:, order]).abs().max() > 1e-2
    same = model(torch.full((1, L), 4)).logits[0]
    assert (same[0] - same[-1]).abs().max() > 1e-2  # a place knows how far the ends are
    assert (same[3] - same[4]).abs().max() > 1e-3
    assert model(IDS[:, :1]).logits.shape == (3, 1, V)
    torch.testing.assert_close(model(IDS[:, :1]).logits, model(IDS[:1, :1]).logits.expand(3, 1, V))  # nothing to see


@torch.no_grad()
def test_rows_do_not_see_each_other() -> None:
    model = hollow_model().double()
    torch.testing.assert_close(model(IDS).logits[1:2], model(IDS[1:2]).logits, rtol=0, atol=1e-12)


@torch.no_grad()
def test_head_at_chosen_positions() -> None:
    model = hollow_model().double()
    positions = torch.rand(3, L, generator=seeded(2)) < 0.4
    output = model(IDS, output_hidden_states=True)
    assert torch.equal(model.hidden(IDS), output.hidden_states)
    torch.testing.assert_close(model.head(output.hidden_states), output.logits, rtol=0, atol=1e-12)
    chosen = model(IDS, positions=positions).logits
    assert chosen.shape == (int(positions.sum()), V)
    torch.testing.assert_close(chosen, output.logits[positions], rtol=0, atol=1e-12)
    assert model(IDS).hidden_states is None
    assert len(model(IDS, return_dict=False)) == 1


def test_save_and_load(tmp_path: Path) -> None:
    model = hollow_model()
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "diffusion_pytorch_model.safetensors").keys() == model.state_dict().keys()
    loaded = HollowTransformerModel.from_pretrained(tmp_path)
    arguments = inspect.signature(HollowTransformerModel.__init__).parameters.keys() - {"self"}
    assert {name: loaded.config[name] for name in arguments} == {name: model.config[name] for name in arguments}
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    rough = HollowTransformerModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert rough.dtype == torch.bfloat16
    assert (rough(IDS).logits.float() - model(IDS).logits).abs().max() < 0.05 * model(IDS).logits.abs().max()


@torch.no_grad()
def test_offloaded_weights_and_meta_device() -> None:
    model = hollow_model()
    expected = model(IDS).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert torch.equal(model(IDS).logits, expected)
    with torch.device("meta"):
        model = HollowTransformerModel(V, hidden_size=H, num_blocks=1, num_heads=HEADS)
        assert model(torch.empty(2, 7, dtype=torch.int64)).logits.shape == (2, 7, V)


def test_gradient_reaches_every_parameter() -> None:
    model = hollow_model().train()
    torch.nn.functional.cross_entropy(model(IDS).logits.flatten(0, 1), IDS.flatten()).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert silent == []


def test_heads_must_divide() -> None:
    with pytest.raises(ValueError, match=r"`hidden_size` \(30\) must be a multiple of `num_heads` \(4\)"):
        hollow_model(hidden_size=30)


def test_in_a_pipeline(tmp_path: Path) -> None:
    """The facts about it are known without being told, also after saving and loading."""
    pipe = tiny_pipeline(model=hollow_model(vocab_size=len(WORDS)))
    assert pipe.denoiser.revealed_logits == "leave_one_out"
    assert pipe.denoiser.split_head
    assert pipe.denoiser.max_length == 32
    sequences = pipe(num_samples=2, length=7, num_inference_steps=3, generator=seeded(), output_type="pt").sequences
    assert (sequences != MASK).all()
    pipe.save_pretrained(tmp_path)
    loaded = DiscreteDiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.model, HollowTransformerModel)
    assert loaded.denoiser.revealed_logits == "leave_one_out"
    assert tiny_pipeline().denoiser.revealed_logits == "none"
