"""The latent adapter: a new one changes nothing, a learned one is loaded bit for bit and sampled through the pipeline, and with
Di4C's losses it makes the tokens of one call depend on each other."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from laws import state_index
from tiny import LENGTH, MASK, WORDS, randomised, seeded, tiny_model, tiny_pipeline
from torch import Tensor, nn
from toys import MASK as TOY_MASK
from toys import VOCAB, Toy
from transformers import BertConfig, BertForMaskedLM

from discrete_schedulers import AbsorbingProcess, DDiTModel, LatentModel, LearnedScheduler, NetworkDenoiser
from discrete_schedulers.training.di4c import di4c_losses, student_log_p, total_loss

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
LORA = {"r": 3, "lora_alpha": 6, "target_modules": ["attn_qkv", "attn_out"]}
KINDS = [pytest.param(None, id="latent only"), pytest.param(LORA, id="lora", marks=needs_peft)]
X = torch.randint(0, len(WORDS), (4, LENGTH), generator=seeded(9))
SIGMA = torch.tensor([0.1, 0.5, 1.0, 2.0])


def adapted(lora: dict[str, Any] | None, seed: int | None = 1) -> LatentModel:
    """An adapter on the tiny model, with random weights or, without a seed, new."""
    model = LatentModel(tiny_model(), "vocab_embed", 32, hidden=16, lora=lora).eval()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.adapter().values():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("lora", KINDS)
def test_a_new_adapter_is_the_network(lora: dict[str, Any] | None) -> None:
    expected = tiny_model()(X, SIGMA).logits
    model = adapted(lora, seed=None)
    assert torch.equal(model(X, SIGMA, latent=torch.rand(4)).logits, expected)
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == sum(
        p.numel() for p in tiny_model().parameters()
    )


@pytest.mark.parametrize("lora", KINDS)
def test_latents_steer_rows_on_their_own(lora: dict[str, Any] | None) -> None:
    model, latent = adapted(lora), torch.tensor([0.1, 0.9, 0.1, 0.4])
    together = model(X[:1].expand(4, -1), SIGMA[:1].expand(4), latent=latent).logits
    assert float((together[0] - together[1]).detach().abs().max()) > 0.1
    torch.testing.assert_close(together[0], together[2])
    for row in range(4):
        alone = model(X[:1], SIGMA[:1], latent=latent[row : row + 1]).logits[0]
        torch.testing.assert_close(alone, together[row], rtol=1e-5, atol=1e-5)
    with model.disabled() as network:
        assert torch.equal(network(X, SIGMA).logits, tiny_model()(X, SIGMA).logits)
    torch.testing.assert_close(model(X[:1], SIGMA[:1], latent=latent[:1]).logits[0], together[0], rtol=1e-5, atol=1e-5)


@needs_peft
def test_lora_is_its_formula() -> None:
    """W_0 + (alpha / r) B A in each named layer, by hand on a plain copy."""
    model, plain = adapted(LORA), tiny_model()
    tensors = model.adapter()
    assert len(tensors) == 4 + 2 * 2 * 2  # the latent's MLP; A and B of two layers in two blocks
    with torch.no_grad():
        for index, block in enumerate(plain.blocks):
            for layer in ("attn_qkv", "attn_out"):
                a, b = (tensors[f"model.blocks.{index}.{layer}.lora_{side}.default.weight"] for side in "AB")
                getattr(block, layer).weight += 6 / 3 * b @ a
    latent = torch.tensor([0.2, 0.4, 0.6, 0.8])
    shift = model.latent_embedding(latent)
    plain.vocab_embed.register_forward_hook(lambda module, inputs, output: output + shift[:, None])
    found = model(X, SIGMA, latent=latent).logits
    torch.testing.assert_close(found, plain(X, SIGMA).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lora", KINDS)
def test_saved_beside_a_scheduler_and_loaded_into_a_pipeline(lora: dict[str, Any] | None, tmp_path: Path) -> None:
    model = adapted(lora)
    facts = {"vocab_size": len(WORDS), "mask_token_id": MASK}
    model.save_pretrained(tmp_path)
    LearnedScheduler(**facts, network_latent=True).save_pretrained(tmp_path)
    names = ["latent_adapter.json", "latent_adapter.safetensors", "scheduler_config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    pipe = tiny_pipeline()
    pipe.model = LatentModel.from_pretrained(tmp_path, pipe.model).eval()
    pipe.scheduler = LearnedScheduler.from_pretrained(tmp_path)
    for name, parameter in model.adapter().items():
        assert torch.equal(parameter, pipe.model.adapter()[name])

    def sample(generator: Any, rows: int = 3) -> Tensor:
        return pipe(num_samples=rows, length=8, num_inference_steps=2, generator=generator, output_type="pt").sequences

    assert torch.equal(sample(seeded(4)), sample(seeded(4)))
    rows = sample([seeded(i) for i in range(3)])
    assert torch.equal(rows[1:2], sample([seeded(1)], 1))  # a row does not depend on its batch
    pipe.scheduler = LearnedScheduler(**facts)  # nobody tells a latent: torch's own generator draws it
    drawn = []
    pipe.model.latent_embedding.register_forward_hook(lambda module, inputs, output: drawn.append(inputs[0]))
    torch.manual_seed(0)
    pipe(num_samples=3, length=8, num_inference_steps=2, generator=seeded(4), output_type="pt")
    assert [len(latent) for latent in drawn] == [3, 3]
    assert len(torch.cat(drawn).unique()) == 6


def test_the_head_is_found_inside_the_adapter() -> None:
    """A network of transformers whose head runs at chosen positions does so under an adapter, and under data parallelism."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = randomised(BertForMaskedLM(BertConfig(**sizes, intermediate_size=16)))
    model = LatentModel(bert, "bert.embeddings.word_embeddings", 16).eval()
    x, latent = torch.randint(0, 10, (3, 5), generator=seeded()), torch.tensor([0.1, 0.5, 0.9])
    wanted = torch.rand(3, 5, generator=seeded(1)) < 0.5
    for network in (model, Wrapped(model)):
        denoiser = NetworkDenoiser(network, 11, 10, head="cls")
        with torch.no_grad():
            dense, rows = denoiser(x, 0.5, latent=latent), denoiser(x, 0.5, wanted, latent=latent)
        torch.testing.assert_close(rows.logits, dense[wanted], rtol=1e-5, atol=1e-5)


class Wrapped(nn.Module):
    """As DistributedDataParallel holds its network."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: Any, **more: Any) -> Any:
        return self.module(*arguments, **more)


def test_only_the_adapter_learns() -> None:
    model = adapted(None)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(X, SIGMA, latent=torch.rand(4, generator=seeded())).logits.square().mean().backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(model.adapter())


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="`embedding` is 'wte', which DDiTModel does not have"):
        LatentModel(tiny_model(), "wte", 32)
    with pytest.raises(ValueError, match=r"`lora` has \['r'\]; it needs \['lora_alpha', 'r', 'target_modules'\]"):
        LatentModel(tiny_model(), "vocab_embed", 32, lora={"r": 4})
    with pytest.raises(ValueError, match=r"`latent` has shape \(3,\), but the batch has 4 rows"):
        adapted(None)(X, SIGMA, latent=torch.rand(3))
    with pytest.raises(ValueError, match="has no latent adapter: looked for latent_adapter"):
        LatentModel.from_pretrained(tmp_path, tiny_model())
    adapted(None).save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "latent_adapter.safetensors")
    safetensors.torch.save_file(tensors | {"more": torch.zeros(1)}, tmp_path / "latent_adapter.safetensors")
    with pytest.raises(ValueError, match=r"more is \(1,\), it needs None"):
        LatentModel.from_pretrained(tmp_path, tiny_model())
    assert json.loads((tmp_path / "latent_adapter.json").read_text())["lora"] is None
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install discrete_schedulers\[adapters\]"):
        adapted(LORA)


def small_teacher(toy: Toy) -> DDiTModel:
    """A transformer fitted to the toy's exact conditionals, all 81 states at once."""
    model = DDiTModel(VOCAB, hidden_size=32, num_blocks=1, num_heads=2, cond_dim=None, max_length=4)
    randomised(model)
    target, is_masked = toy.log_p_0[..., :TOY_MASK].exp().float(), toy.states == TOY_MASK
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        log_p = model(toy.states).logits[..., :TOY_MASK].log_softmax(-1)
        nn.functional.kl_div(log_p[is_masked], target[is_masked], reduction="sum").backward()
        optimizer.step()
    return model


@needs_peft
@pytest.mark.slow
def test_di4c_on_a_network() -> None:
    """LoRA and latent on a frozen transformer, sampled batches: a single call of the student against the teacher's 1.0976."""
    toy, process = Toy("ising", 4), AbsorbingProcess(VOCAB, TOY_MASK, "linear")
    torch.manual_seed(0)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": ["attn_qkv", "attn_out", "mlp.0", "mlp.2"]}
    model = LatentModel(small_teacher(toy), "vocab_embed", 32, hidden=64, lora=settings)
    masks, clean = torch.full((1, 4), TOY_MASK), toy.joint.states
    with torch.no_grad(), model.disabled() as network:
        table = network(toy.states).logits

    def one_call_kl() -> float:
        latents = ((torch.arange(256) + 0.5) / 256)[:, None]
        with torch.no_grad():
            log_p = student_log_p(student, masks, torch.ones(1), latents, TOY_MASK).double()[:, 0]  # (J, L, V)
        law = torch.stack([log_p[:, i, clean[:, i]] for i in range(4)]).sum(0).exp().mean(0)
        return float((toy.joint.p * (toy.joint.p / law).log()).sum())

    def student(x_t: Tensor, t: Tensor, latent: Tensor) -> Tensor:
        return model(x_t, latent=latent.float()).logits

    def teacher(x_t: Tensor, t: Tensor) -> Tensor:
        return table[state_index(x_t, VOCAB)]

    assert one_call_kl() == pytest.approx(1.0976, abs=0.02)
    generator = seeded(3)
    optimizer = torch.optim.Adam(model.adapter().values(), lr=1e-2)
    for _ in range(150):
        rows = torch.multinomial(toy.joint.p, 32, replacement=True, generator=generator)
        t = (torch.randint(1, 9, (32,), generator=generator) / 8).double()
        t[:12] = 1.0
        losses = di4c_losses(student, teacher, process, clean[rows], t, (t - 1 / 8).clamp(min=1e-3), 4, generator)
        optimizer.zero_grad()
        total_loss(losses, t, 1.5 / 8, 1.0).mean().backward()
        optimizer.step()
    assert one_call_kl() < 0.5  # 0.24 and 0.32 from two starts; a product of positions cannot be below 1.0976
