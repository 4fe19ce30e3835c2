"""Image models as they are on the Hub, scaled down, with random weights: served from loopback, loaded by their id, held against
diffusers' own network and pipeline (aMUSEd) or the formula of the network in float64 (Meissonic, Halton-MaskGIT, LlamaGen).
"""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel, VQModel
from hub import LoopbackHub
from test_families import publish
from tiny import randomised, seeded
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

import discrete_schedulers
from discrete_schedulers import (
    DiscreteDiffusionPipeline,
    DiscreteImagePipeline,
    HaltonMaskGITModel,
    MaskGITScheduler,
    MeissonicTransformerModel,
    SpreadScheduler,
)
from discrete_schedulers.models.image_checkpoints import (
    HALTON_FILES,
    HALTON_HEADS,
    HALTON_REPOSITORY,
    llamagen_decoder,
    load_halton,
)
from discrete_schedulers.pipelines.images import decode, encode
from discrete_schedulers.training import distill
from discrete_schedulers.training.frozen import FrozenImages

# ---- aMUSEd ----------------------------------------------------------------------------------------------------------

CODES, MASK, STATES = 24, 31, 32  # published: 8192 codes, 8256 states, the mask the last of them
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """Letters and letters that end a word; no merges."""
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 12}))
    return CLIPTokenizer.from_pretrained(folder)


def clip_text_model(vocab_size: int, width: int = 32) -> CLIPTextModelWithProjection:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=48,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=12,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )
    return CLIPTextModelWithProjection(config).eval()


def vq_model() -> VQModel:
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4}
    blocks |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return VQModel(**blocks, num_vq_embeddings=CODES, lookup_from_codebook=True, mid_block_add_attention=False).eval()


@pytest.fixture(scope="module")
def amused(tmp_path_factory: pytest.TempPathFactory) -> AmusedPipeline:
    """The published components, small: image of 8 x 8 pixels, 4 x 4 tokens, network with its halving of the grid."""
    tokenizer = clip_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    network = UVit2DModel(
        hidden_size=32,
        cond_embed_dim=32,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=32,
        vocab_size=STATES,
        codebook_size=CODES,
        in_channels=16,
        block_out_channels=16,
        num_res_blocks=1,
        downsample=True,
        upsample=True,
        block_num_heads=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        sample_size=4,
    )
    parts = {"transformer": randomised(network), "scheduler": AmusedScheduler(mask_token_id=MASK)}
    text_encoder = clip_text_model(len(tokenizer))
    pipe = AmusedPipeline(vq_model(), tokenizer, text_encoder, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def amused_folder(amused: AmusedPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("amused")
    amused.save_pretrained(folder)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "AmusedPipeline"
    return folder


@pytest.fixture
def pipe(amused_folder: Path) -> DiscreteImagePipeline:
    pipe = DiscreteImagePipeline.from_pretrained(amused_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_amused_facts(pipe: DiscreteImagePipeline) -> None:
    facts = pipe.config.denoiser
    assert (facts["vocab_size"], facts["mask_token_id"], facts["codebook_size"]) == (STATES, MASK, CODES)
    assert (facts["grid_shape"], facts["process"], facts["grid_input"]) == ([4, 4], "absorbing", True)
    assert type(pipe.scheduler) is MaskGITScheduler
    assert (pipe.scheduler.config.mask_schedule, pipe.scheduler.config.choice_temperature) == ("cosine", 2.0)
    assert not any(part.training for part in (pipe.model, pipe.decoder, pipe.text_encoder))


def test_amused_in_distillation(pipe: DiscreteImagePipeline) -> None:
    """Samples show the prompts in turn; what is asked of data is asked behind the empty prompt."""
    height, width = pipe.config.denoiser["grid_shape"]
    frozen = FrozenImages(pipe, height * width, ["a red boat", "a hill"], 3.0)
    x, calls = frozen.draw(range(1, 3), 2, [seeded(i) for i in range(2)])
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    own = pipe(["a hill", "a red boat"], **call, generator=[seeded(i) for i in range(2)])
    assert torch.equal(x, own.sequences)
    assert calls == own.num_model_calls == 4
    hidden = torch.arange(x.shape[1]).expand_as(x) % 3 == 0
    masked = x.masked_fill(hidden, frozen.denoiser.mask_token_id)
    nothing = pipe.text_conditions([""], 2, (height, width), 0.0, 0.0, 6.0)
    plain = pipe.denoiser(masked, 0.5, hidden, **nothing).logits
    assert torch.equal(frozen.denoiser(masked, 0.5, hidden).logits, plain)
    told = pipe.text_conditions(["a hill"], 2, (height, width), 0.0, 0.0, 6.0)
    assert not torch.equal(pipe.denoiser(masked, 0.5, hidden, **told).logits, plain)
    assert torch.isfinite(frozen.features([], 2)(x)).all()
    assert (
        frozen.example(4)
        == "pipe('a red boat', guidance_scale=3.0, num_inference_steps=4).images[0].save(\"sample.png\")"
    )


def test_amused_in_distillation_in_half_precision(amused_folder: Path) -> None:
    """Network and text encoder; pixels stay as they were."""
    given = ["--pretrained_model_name_or_path", str(amused_folder), "--output_dir", "out", "--method", "search"]
    args = distill.parse_args([*given, "--guidance_scale", "2", "--mixed_precision", "bf16"])
    frozen = distill.load_model(args, accelerate.Accelerator())
    assert isinstance(frozen, FrozenImages)
    parts = (frozen.pipe.model, frozen.pipe.text_encoder, frozen.pipe.decoder)
    assert [part.dtype for part in parts] == [torch.bfloat16, torch.bfloat16, torch.float32]
    x, _ = frozen.draw(range(2), 2, [seeded(0), seeded(1)])
    assert frozen.pixels(x).dtype == torch.float32
    assert frozen.features([], 2)(x).isfinite().all()


def test_amused_guided_logits(pipe: DiscreteImagePipeline, amused: AmusedPipeline) -> None:
    """u + s (c - u) of diffusers' network, channels last; ids beyond the codes are never drawn."""
    prompts, x = ["a cat", "dogs"], torch.randint(0, CODES, (2, 24), generator=seeded())
    x[:, ::3] = MASK
    extra = ((4, 6), 1.0, 2.0, 5.0)
    with torch.no_grad():
        positive, negative = (pipe.text_conditions(texts, 2, *extra) for texts in (prompts, [""]))
        logits = pipe.denoiser_for((4, 6), 7, positive, negative, 3.0, "constant")(x, 0.5)
        raw = []
        for texts in (prompts, ["", ""]):
            ids = amused.tokenizer(texts, padding="max_length", max_length=12, return_tensors="pt").input_ids
            output = amused.text_encoder(ids, output_hidden_states=True)
            micro = torch.tensor([[12.0, 8.0, 1.0, 2.0, 5.0]]).expand(2, -1)  # width before height
            arguments = {"pooled_text_emb": output.text_embeds, "encoder_hidden_states": output.hidden_states[-2]}
            raw.append(amused.transformer(x.view(2, 4, 6), micro_conds=micro, **arguments))
    expected = (raw[1] + 3 * (raw[0] - raw[1])).permute(0, 2, 3, 1).reshape(2, 24, CODES)
    assert expected.std() > 0.1
    assert (raw[0] - raw[1]).abs().max() > 1e-3
    assert torch.allclose(logits[..., :CODES], expected, atol=1e-5)
    assert (logits[..., CODES:] == -math.inf).all()


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_amused_head_at_chosen_positions(pipe: DiscreteImagePipeline, guidance_scale: float) -> None:
    """The logits of the whole grid, and the head sees no more hidden states than were asked for; a sample without a position
    that is asked for is not run."""
    x = torch.randint(0, CODES, (3, 24), generator=seeded())
    positions = torch.rand(3, 24, generator=seeded(1)) < 0.3
    positions[1] = False
    seen: list[tuple[int, ...]] = []
    watch = pipe.model.mlm_layer.conv2.register_forward_hook(lambda _, inputs, output: seen.append(output.shape))
    with torch.no_grad():
        positive, negative = (pipe.text_conditions([text] * 3, 3, (4, 6), 1.0, 2.0, 5.0) for text in ("a cat", ""))
        denoiser = pipe.denoiser_for((4, 6), 7, positive, negative, guidance_scale, "constant")
        dense, rows = denoiser(x, 0.5), denoiser(x, 0.5, positions)
    watch.remove()
    number = int(positions.sum())
    torch.testing.assert_close(rows.logits, dense[positions], rtol=1e-5, atol=1e-5)
    assert rows.logits.shape == (number, STATES)
    half = len(seen) // 2
    assert sum(shape[0] * shape[2] * shape[3] for shape in seen[:half]) == (72 if guidance_scale == 1 else 144)
    assert sum(shape[0] * shape[2] * shape[3] for shape in seen[half:]) == (
        number if guidance_scale == 1 else 2 * number
    )


def test_amused_run_is_that_of_diffusers(pipe: DiscreteImagePipeline, amused: AmusedPipeline) -> None:
    """Their pipeline and scheduler against their scheduler in ours: the same draws, tokens and pixels. Their network gets the
    columns that it lacks, so that both draw among equally many."""

    def widen(module: Any, inputs: Any, logits: Tensor) -> Tensor:
        return F.pad(logits, (0, 0, 0, 0, 0, STATES - CODES), value=-1e9)

    arguments = {"height": 8, "width": 12, "num_inference_steps": 5, "guidance_scale": 4.0}
    prompts = {"prompt": ["a cat", "the sea"], "negative_prompt": ["fog", "a"]}
    hook = amused.transformer.register_forward_hook(widen)
    try:
        theirs = [
            amused(**prompts, **arguments, generator=seeded(3), output_type=kind).images for kind in ("latent", "pt")
        ]
    finally:
        hook.remove()
    pipe.scheduler = AmusedScheduler(mask_token_id=MASK)
    ours = pipe(**prompts, **arguments, generator=seeded(3), output_type="pt")
    assert torch.equal(ours.sequences.view(2, 4, 6), theirs[0])
    assert len(ours.sequences.unique()) > 5
    assert torch.allclose(ours.images, theirs[1], atol=1e-6)
    assert ours.num_model_calls == 10


def test_amused_paints_with_our_schedulers(pipe: DiscreteImagePipeline) -> None:
    picture, sheet = torch.rand(1, 3, 8, 8, generator=seeded()), torch.zeros(8, 8)
    sheet[:, 4:] = 1
    ids = encode(pipe.decoder, picture, False).flatten(1).detach()
    is_left = (torch.arange(16) % 4 < 2).expand(6, -1)
    for scheduler in (pipe.scheduler, SpreadScheduler.from_config(pipe.scheduler.config, pattern="halton")):
        pipe.scheduler = scheduler
        output = pipe(
            "a cat",
            image=picture,
            mask_image=sheet,
            num_images_per_prompt=6,
            guidance_scale=2.0,
            guidance_schedule="cosine",
            num_inference_steps=4,
            generator=seeded(),
        )
        assert torch.equal(output.sequences[is_left], ids.expand(6, -1)[is_left])
        assert (output.sequences < CODES).all()
        assert len({tuple(row) for row in output.sequences.tolist()}) == 6
        assert [picture.size for picture in output.images] == [(8, 8)] * 6


def test_amused_saves_as_ours(pipe: DiscreteImagePipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    loaded = DiscreteImagePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 3, "guidance_scale": 2.0}
    once, again = (one("a cat", generator=seeded(), **arguments).sequences for one in (pipe, loaded))
    assert torch.equal(once, again)
    with pytest.raises(ValueError, match="`prompt` is required: this model is conditioned on text"):
        loaded()


def test_amused_in_half_precision(amused: AmusedPipeline, tmp_path: Path) -> None:
    """Files of a variant, as they are published too; a decoder that asks for it runs in float32 all the same."""
    amused.save_pretrained(tmp_path, variant="fp16")
    pipe = DiscreteImagePipeline.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    parts = (pipe.model, pipe.decoder, pipe.text_encoder)
    assert [part.dtype for part in parts] == [torch.float16] * 3
    weight = pipe.model.embed.embeddings.weight
    assert torch.equal(weight, amused.transformer.embed.embeddings.weight.half())
    pipe.decoder.register_to_config(force_upcast=True)
    ids = torch.randint(0, CODES, (1, 4, 4), generator=seeded())
    with torch.no_grad():
        pixels = decode(pipe.decoder, ids, False)
    assert pixels.dtype == torch.float32
    assert pipe.decoder.dtype == torch.float16
    with torch.no_grad():
        assert torch.equal(pixels, decode(pipe.decoder.float(), ids, False))


# ---- Meissonic -------------------------------------------------------------------------------------------------------

HEADS, HEAD_DIM, AXES = 2, 16, (4, 6, 6)
# The published config.json, scaled down; its class is not the one of this name in diffusers.
MEISSONIC = {"_class_name": "Transformer2DModel", "_diffusers_version": "0.30.2", "attention_head_dim": HEAD_DIM}
MEISSONIC |= {"axes_dims_rope": AXES, "codebook_size": CODES, "downsample": True, "guidance_embeds": False}
MEISSONIC |= {
    "in_channels": 64,
    "joint_attention_dim": 32,
    "num_attention_heads": HEADS,
    "num_layers": 2,
    "patch_size": 1,
}
MEISSONIC |= {"num_single_layers": 2, "pooled_projection_dim": 32, "upsample": True, "vocab_size": STATES}


def meissonic_network() -> MeissonicTransformerModel:
    names = {name: value for name, value in MEISSONIC.items() if not name.startswith("_")}
    return randomised(
        MeissonicTransformerModel(**{n: v for n, v in names.items() if n not in ("in_channels", "patch_size")})
    )


def meissonic_reference(
    state: dict[str, Tensor], ids: Tensor, timestep: float, text: Tensor, pooled: Tensor, micro: Tensor
) -> Tensor:
    """The formula, in float64."""
    s = {key: tensor.double() for key, tensor in state.items()}
    silu, gelu = F.silu, lambda x: F.gelu(x, approximate="tanh")

    def linear(key: str, x: Tensor) -> Tensor:
        return x @ s[f"{key}.weight"].T + s.get(f"{key}.bias", 0)

    def rms(key: str, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * s[f"{key}.weight"]

    def centred(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    def two_layers(key: str, x: Tensor) -> Tensor:
        return linear(f"{key}.linear_2", silu(linear(f"{key}.linear_1", x)))

    def waves(values: Tensor) -> Tensor:
        angle = values.double()[..., None] * 10000.0 ** -(torch.arange(128) / 128)
        return torch.cat([angle.cos(), angle.sin()], -1)

    def turned(x: Tensor, places: Tensor) -> Tensor:
        angle = torch.cat([places[:, [i]] * 10000.0 ** -(torch.arange(0, w, 2) / w) for i, w in enumerate(AXES)], -1)
        even, odd = x[..., ::2], x[..., 1::2]
        pairs = even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()
        return torch.stack(pairs, -1).flatten(-2)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        share = (turned(q, places) @ turned(k, places).mT / math.sqrt(HEAD_DIM)).softmax(-1)
        return (share @ v).transpose(1, 2).flatten(2)

    condition = two_layers("cond_embed", torch.cat([pooled.double(), waves(micro).flatten(1)], -1))
    at = torch.full((len(ids),), timestep * 1000)
    e = two_layers("time_text_embed.timestep_embedder", waves(at)) + two_layers(
        "time_text_embed.text_embedder", condition
    )
    e = silu(e)[:, None]
    x = (
        rms("embed.layer_norm", s["embed.embeddings.weight"][ids]) @ s["embed.conv.weight"][:, :, 0, 0].T
    )  # (B, h, w, H)
    x = rms("down_block.downsample.norm", x).permute(0, 3, 1, 2)
    x = F.conv2d(x, s["down_block.downsample.conv.weight"], stride=2)
    rows, columns = x.shape[-2:]
    x = linear("project_to_hidden", rms("project_to_hidden_norm", x.flatten(2).mT))
    c = rms("encoder_proj_layer_norm", linear("context_embedder", text.double()))
    length = c.shape[1]
    cells = [(0.0, float(row), float(column)) for row in range(rows) for column in range(columns)]
    places = torch.tensor([(0.0, 0.0, 0.0)] * length + cells, dtype=torch.float64)
    for i in range(2):
        b = f"transformer_blocks.{i}."
        shift, scale, gate, shift_m, scale_m, gate_m = linear(f"{b}norm1.linear", e).chunk(6, -1)
        c_shift, c_scale, c_gate, c_shift_m, c_scale_m, c_gate_m = linear(f"{b}norm1_context.linear", e).chunk(6, -1)
        h, g = centred(x) * (1 + scale) + shift, centred(c) * (1 + c_scale) + c_shift
        q, k, v = (heads(linear(f"{b}attn.to_{name}", h)) for name in "qkv")
        q_c, k_c, v_c = (heads(linear(f"{b}attn.add_{name}_proj", g)) for name in "qkv")
        q = torch.cat([rms(f"{b}attn.norm_added_q", q_c), rms(f"{b}attn.norm_q", q)], 2)
        k = torch.cat([rms(f"{b}attn.norm_added_k", k_c), rms(f"{b}attn.norm_k", k)], 2)
        out = attention(q, k, torch.cat([v_c, v], 2))
        x = x + gate * linear(f"{b}attn.to_out.0", out[:, length:])
        c = c + c_gate * linear(f"{b}attn.to_add_out", out[:, :length])
        h, g = centred(x) * (1 + scale_m) + shift_m, centred(c) * (1 + c_scale_m) + c_shift_m
        x = x + gate_m * linear(f"{b}ff.net.2", gelu(linear(f"{b}ff.net.0.proj", h)))
        c = c + c_gate_m * linear(f"{b}ff_context.net.2", gelu(linear(f"{b}ff_context.net.0.proj", g)))
    x = torch.cat([c, x], 1)
    for i in range(2):
        b = f"single_transformer_blocks.{i}."
        shift, scale, gate = linear(f"{b}norm.linear", e).chunk(3, -1)
        h = centred(x) * (1 + scale) + shift
        q, k, v = (heads(linear(f"{b}attn.to_{name}", h)) for name in "qkv")
        out = attention(rms(f"{b}attn.norm_q", q), rms(f"{b}attn.norm_k", k), v)
        x = x + gate * linear(f"{b}proj_out", torch.cat([out, gelu(linear(f"{b}proj_mlp", h))], -1))
    x = linear("project_from_hidden", rms("project_from_hidden_norm", x[:, length:])).unflatten(1, (rows, columns))
    x = rms("up_block.upsample.norm", x).permute(0, 3, 1, 2)
    x = F.conv_transpose2d(x, s["up_block.upsample.conv.weight"], stride=2).permute(0, 2, 3, 1)
    x = rms("mlm_layer.layer_norm", x @ s["mlm_layer.conv1.weight"][:, :, 0, 0].T)
    return (x @ s["mlm_layer.conv2.weight"][:, :, 0, 0].T).flatten(1, 2)


@pytest.fixture(scope="module")
def meissonic_folder(amused_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published: a pipeline and a scheduler of its own code, which are not run, and aMUSEd's other components."""
    folder = tmp_path_factory.mktemp("meissonic")
    for name in ("vqvae", "text_encoder", "tokenizer"):
        shutil.copytree(amused_folder / name, folder / name)
    meissonic_network().save_pretrained(folder / "transformer")
    (folder / "transformer" / "config.json").write_text(json.dumps(MEISSONIC))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"mask_token_id": MASK}))
    index = {"_class_name": "Pipeline", "transformer": ["transformer", "Transformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["scheduler", "Scheduler"]}))
    return folder


@pytest.fixture
def meissonic(meissonic_folder: Path) -> DiscreteImagePipeline:
    pipe = DiscreteImagePipeline.from_pretrained(meissonic_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_meissonic_facts(warnings_of_diffusers: Callable[[], list[str]], meissonic: DiscreteImagePipeline) -> None:
    facts = meissonic.config.denoiser
    assert (facts["vocab_size"], facts["mask_token_id"], facts["codebook_size"]) == (STATES, MASK, CODES)
    assert (facts["grid_shape"], facts["time_input"], facts["grid_input"]) == ([64, 64], "steps_left", True)
    assert type(meissonic.model) is MeissonicTransformerModel
    assert type(meissonic.scheduler) is MaskGITScheduler
    assert warnings_of_diffusers() == []


@pytest.mark.parametrize(("t", "steps", "left"), [(1.0, 8, 7), (0.125, 8, 0), (0.75, 4, 2)])
def test_meissonic_guided_logits(meissonic: DiscreteImagePipeline, t: float, steps: int, left: int) -> None:
    x = torch.randint(0, CODES, (2, 24), generator=seeded())
    x[:, 1::3] = MASK
    extra = ((4, 6), 1.0, 2.0, 5.0)
    with torch.no_grad():
        c, u = (meissonic.text_conditions(texts, 2, *extra) for texts in (["a cat", "dogs"], [""]))
        logits = meissonic.denoiser_for((4, 6), steps, c, u, 9.0, "constant")(x, t)
        state = meissonic.model.state_dict()
        branches = [
            meissonic_reference(
                state,
                x.view(2, 4, 6),
                left,
                told["encoder_hidden_states"],
                told["pooled_text_emb"],
                told["micro_conds"],
            )
            for told in (c, u)
        ]
    expected = branches[1] + 9 * (branches[0] - branches[1])
    assert (branches[0] - branches[1]).abs().max() > 0.1
    assert torch.allclose(logits[..., :CODES].double(), expected, atol=1e-3)
    assert (logits[..., CODES:] == -math.inf).all()


def test_meissonic_samples(meissonic: DiscreteImagePipeline, tmp_path: Path) -> None:
    arguments = {"height": 8, "width": 12, "num_inference_steps": 3, "guidance_scale": 9.0, "output_type": "pt"}
    seen = []
    hook = meissonic.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1].tolist()))
    output = meissonic("a cat", **arguments, generator=seeded())
    hook.remove()
    assert seen == [[2.0, 2.0], [1.0, 1.0], [0.0, 0.0]]  # as the published pipeline counts them, in both branches
    assert output.images.shape == (1, 3, 8, 12)
    assert (output.sequences < CODES).all()
    meissonic.save_pretrained(tmp_path)
    loaded = DiscreteImagePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(loaded("a cat", **arguments, generator=seeded()).sequences, output.sequences)


def test_meissonic_arguments_that_are_not_allowed() -> None:
    with pytest.raises(ValueError, match="`guidance_embeds` is True"):
        MeissonicTransformerModel(guidance_embeds=True)
    with pytest.raises(ValueError, match="`pooled_projection_dim` is 768; the heads are 1024 wide together"):
        MeissonicTransformerModel(pooled_projection_dim=768)
    with pytest.raises(ValueError, match="the grid must come back"):
        MeissonicTransformerModel(upsample=False)


# ---- Halton-MaskGIT --------------------------------------------------------------------------------------------------

WIDTH, LAYERS, GRID, CLASSES, HALTON_CODES = (
    384,
    2,
    4,
    3,
    32,
)  # heads are known by the width: the smallest published one


def halton_shapes(codes: int, width: int, layers: int, heads: int, grid: int, classes: int) -> dict[str, tuple]:
    """The published keys."""
    inner, mlp = heads * (width // heads), 256 * math.ceil(int(8 * width / 3) / 256)
    shapes: dict[str, tuple] = {"cls_emb.weight": (classes + 1, width), "tok_emb.weight": (codes + 1, width)}
    shapes |= {"pos_emb.weight": (grid**2, width), "reg_tokens.weight": (1, width)}
    for i in range(layers):
        layer = f"transformer.layers.{i}."
        shapes |= {f"{layer}mlp.1.weight": (6 * width, width), f"{layer}mlp.1.bias": (6 * width,)}
        shapes |= {f"{layer}ln1.weight": (width,), f"{layer}ln2.weight": (width,)}
        shapes |= {f"{layer}attn.w{name}.weight": (inner, width) for name in "qkv"}
        shapes |= {f"{layer}attn.wo.weight": (width, inner), f"{layer}ff.w2.weight": (width, mlp)}
        shapes |= {f"{layer}ff.w1.weight": (mlp, width), f"{layer}ff.w3.weight": (mlp, width)}
    shapes |= {"last_norm.norm_final.weight": (width,), "last_norm.norm_final.bias": (width,)}
    shapes |= {"last_norm.mlp.1.weight": (2 * width, width), "last_norm.mlp.1.bias": (2 * width,)}
    return shapes | {"head.weight": (codes + 1, width), "head.bias": (codes + 1,)}


def drawn(shapes: dict[str, tuple], seed: int = 0) -> dict[str, Tensor]:
    """Random weights of variance 1 / fan-in; norms about 1."""
    generator, state = seeded(seed), {}
    for key, shape in shapes.items():
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 10
        centre = float(len(shape) == 1 and key.endswith("weight"))
        state[key] = centre + torch.randn(shape, generator=generator) / math.sqrt(fan_in)
    return state


def halton_reference(state: dict[str, Tensor], ids: Tensor, labels: Tensor, heads: int) -> Tensor:
    """The formula, in float64."""
    s = {key: tensor.double() for key, tensor in state.items()}

    def over_rms(x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()

    y = s["cls_emb.weight"][labels]
    act = y / (1 + (-y).exp())
    register = s["reg_tokens.weight"].expand(len(ids), -1, -1)
    x = torch.cat([s["tok_emb.weight"][ids] + s["pos_emb.weight"][: ids.shape[1]], register], dim=1)
    for i in range(sum(key.endswith("ln1.weight") for key in s)):
        w = {key.removeprefix(f"transformer.layers.{i}."): value for key, value in s.items()}
        parts = (act @ w["mlp.1.weight"].T + w["mlp.1.bias"])[:, None].chunk(6, -1)
        h = over_rms(x) * w["ln1.weight"] * (1 + parts[1]) + parts[0]
        q, k, v = (h @ w[f"attn.w{name}.weight"].T for name in "qkv")
        q, k = over_rms(q), over_rms(k)
        width = q.shape[-1] // heads
        out = []
        for head in range(heads):
            one = slice(head * width, (head + 1) * width)
            share = (q[..., one] @ k[..., one].mT / math.sqrt(width)).softmax(-1)
            out.append(share @ v[..., one])
        x = x + parts[2] * (torch.cat(out, -1) @ w["attn.wo.weight"].T)
        h = over_rms(x) * w["ln2.weight"] * (1 + parts[4]) + parts[3]
        gate = h @ w["ff.w1.weight"].T
        x = x + parts[5] * ((gate / (1 + (-gate).exp()) * (h @ w["ff.w3.weight"].T)) @ w["ff.w2.weight"].T)
    shift, scale = (act @ s["last_norm.mlp.1.weight"].T + s["last_norm.mlp.1.bias"])[:, None].chunk(2, -1)
    x = over_rms(x) * s["last_norm.norm_final.weight"] + s["last_norm.norm_final.bias"]
    return (x * (1 + scale) + shift)[:, : ids.shape[1]] @ s["head.weight"].T + s["head.bias"]


# LlamaGen's tokenizer: the published keys, and its formula


def llamagen_shapes(channels: tuple[int, ...], latent: int, codes: int, used: int) -> dict[str, tuple]:
    shapes: dict[str, tuple] = {}

    def conv(key: str, out: int, into: int, size: int) -> None:
        shapes.update({f"{key}.weight": (out, into, size, size), f"{key}.bias": (out,)})

    def norm(key: str, width: int) -> None:
        shapes.update({f"{key}.weight": (width,), f"{key}.bias": (width,)})

    def residual(key: str, into: int, out: int) -> None:
        norm(f"{key}.norm1", into)
        conv(f"{key}.conv1", out, into, 3)
        norm(f"{key}.norm2", out)
        conv(f"{key}.conv2", out, out, 3)
        if into != out:
            conv(f"{key}.nin_shortcut", out, into, 1)

    def attention(key: str, width: int) -> None:
        norm(f"{key}.norm", width)
        for name in ("q", "k", "v", "proj_out"):
            conv(f"{key}.{name}", width, width, 1)

    last = channels[-1]
    for part, levels, repeats in (("encoder", channels, 2), ("decoder", channels[::-1], 3)):
        width = channels[0] if part == "encoder" else last
        conv(f"{part}.conv_in", width, 3 if part == "encoder" else latent, 3)
        for i, out in enumerate(levels):
            for j in range(repeats):
                residual(f"{part}.conv_blocks.{i}.res.{j}", width, out)
                width = out
                if i == (len(levels) - 1 if part == "encoder" else 0):
                    attention(f"{part}.conv_blocks.{i}.attn.{j}", width)
            if i < len(levels) - 1:
                conv(f"{part}.conv_blocks.{i}.{'down' if part == 'encoder' else 'up'}sample.conv", width, width, 3)
        for j in (0, 2):
            residual(f"{part}.mid.{j}", last, last)
        attention(f"{part}.mid.1", last)
        norm(f"{part}.norm_out", width)
        conv(f"{part}.conv_out", latent if part == "encoder" else 3, width, 3)
    conv("quant_conv", 8, latent, 1)
    conv("post_quant_conv", latent, 8, 1)
    return shapes | {"quantize.embedding.weight": (codes, 8), "quantize.codebook_used": (used,)}


class LlamaGenReference:
    """The formula, in float64."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.s = {key: tensor.double() for key, tensor in state.items()}
        self.codes = self.s["quantize.embedding.weight"]
        self.codes = self.codes / self.codes.norm(dim=-1, keepdim=True)

    def conv(self, key: str, x: Tensor, **options: Any) -> Tensor:
        weight = self.s[f"{key}.weight"]
        return F.conv2d(x, weight, self.s[f"{key}.bias"], **({"padding": weight.shape[-1] // 2} | options))

    def norm(self, key: str, x: Tensor) -> Tensor:
        grouped = x.reshape(len(x), 32, -1)
        grouped = (grouped - grouped.mean(-1, keepdim=True)) / (
            grouped.var(-1, correction=0, keepdim=True) + 1e-6
        ).sqrt()
        return grouped.reshape(x.shape) * self.s[f"{key}.weight"][:, None, None] + self.s[f"{key}.bias"][:, None, None]

    def residual(self, key: str, x: Tensor) -> Tensor:
        h = self.conv(f"{key}.conv1", F.silu(self.norm(f"{key}.norm1", x)))
        h = self.conv(f"{key}.conv2", F.silu(self.norm(f"{key}.norm2", h)))
        return h + (self.conv(f"{key}.nin_shortcut", x) if f"{key}.nin_shortcut.weight" in self.s else x)

    def attention(self, key: str, x: Tensor) -> Tensor:
        h = self.norm(f"{key}.norm", x)
        q, k, v = (self.conv(f"{key}.{name}", h).flatten(2) for name in "qkv")
        share = (q.mT @ k / math.sqrt(q.shape[1])).softmax(-1)
        return x + self.conv(f"{key}.proj_out", (v @ share.mT).reshape(x.shape))

    def run(self, part: str, x: Tensor) -> Tensor:
        x = self.conv(f"{part}.conv_in", x)
        x = self.middle(part, x) if part == "decoder" else x
        for i in range(1 + max(int(key.split(".")[2]) for key in self.s if key.startswith(f"{part}.conv_blocks"))):
            block = f"{part}.conv_blocks.{i}"
            for j in range(3):
                x = self.residual(f"{block}.res.{j}", x) if f"{block}.res.{j}.conv1.weight" in self.s else x
                x = self.attention(f"{block}.attn.{j}", x) if f"{block}.attn.{j}.q.weight" in self.s else x
            if f"{block}.upsample.conv.weight" in self.s:
                x = self.conv(f"{block}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
            if f"{block}.downsample.conv.weight" in self.s:  # padded on the right and below only
                x = self.conv(f"{block}.downsample.conv", F.pad(x, (0, 1, 0, 1)), padding=0, stride=2)
        x = self.middle(part, x) if part == "encoder" else x
        return self.conv(f"{part}.conv_out", F.silu(self.norm(f"{part}.norm_out", x)))

    def middle(self, part: str, x: Tensor) -> Tensor:
        x = self.attention(f"{part}.mid.1", self.residual(f"{part}.mid.0", x))
        return self.residual(f"{part}.mid.2", x)

    def encode(self, pixels: Tensor) -> Tensor:
        z = self.conv("quant_conv", self.run("encoder", 2 * pixels.double() - 1)).permute(0, 2, 3, 1)
        return (z / z.norm(dim=-1, keepdim=True) @ self.codes.T).argmax(-1)

    def decode(self, ids: Tensor) -> Tensor:
        codes = self.codes[ids].permute(0, 3, 1, 2)
        return (self.run("decoder", self.conv("post_quant_conv", codes)).clamp(-1, 1) + 1) / 2


HALTON_SHAPES = halton_shapes(HALTON_CODES, WIDTH, LAYERS, HALTON_HEADS[WIDTH], GRID, CLASSES)
VQ_SHAPES = llamagen_shapes((32, 64, 64), 16, HALTON_CODES, 64)


def halton_state() -> dict[str, Tensor]:
    state = {key: tensor.half().float() for key, tensor in drawn(HALTON_SHAPES).items()}
    return state | {"head.weight": state["tok_emb.weight"]}


def pickled(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def halton_file() -> bytes:
    """As the training script writes it: prefixes of wrappers, and the optimizer beside the weights."""
    weights = {f"module._orig_mod.{key}": tensor.half() for key, tensor in halton_state().items()}
    optimizer = {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    return pickled({"iter": 5, "global_epoch": 1, "model_state_dict": weights, "optimizer_state_dict": optimizer})


@pytest.fixture(scope="module")
def halton_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("halton")
    (folder / "ImageNet_256_tiny.pth").write_bytes(halton_file())
    (folder / "vq_ds16_c2i.pt").write_bytes(pickled({"model": drawn(VQ_SHAPES, 1), "optimizer": {"lr": 0.1}}))
    return folder


@pytest.fixture
def halton(halton_folder: Path) -> DiscreteImagePipeline:
    names = {"weight_name": "ImageNet_256_tiny.pth", "decoder": halton_folder}
    pipe = DiscreteImagePipeline.from_pretrained(halton_folder, **names, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_halton_facts(halton: DiscreteImagePipeline) -> None:
    facts = halton.config.denoiser
    assert (facts["vocab_size"], facts["mask_token_id"], facts["grid_shape"]) == (33, 32, [GRID, GRID])
    assert (type(halton.scheduler), halton.scheduler.config.pattern) == (SpreadScheduler, "halton")
    assert halton.config.signed_pixels is True


def test_halton_weights_that_are_offloaded() -> None:
    """accelerate brings each module's own weights in for its forward only."""
    torch.manual_seed(0)
    network = HaltonMaskGITModel(6, 16, 1, 2, 16, grid_size=2, num_classes=3).eval()
    ids, labels = torch.tensor([[0, 5, 2, 3], [5, 5, 5, 5]]), torch.tensor([0, 3])
    expected = network(ids, labels).logits
    accelerate.cpu_offload(network, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    assert torch.equal(network(ids, labels).logits, expected)


def test_halton_guided_logits(halton: DiscreteImagePipeline) -> None:
    ids = torch.randint(0, HALTON_CODES + 1, (3, GRID**2), generator=seeded())
    labels, anything = torch.tensor([0, 2, 1]), torch.full((3,), CLASSES)
    heads = HALTON_HEADS[WIDTH]
    c, u = (halton_reference(halton_state(), ids, y, heads) for y in (labels, anything))
    conditions = {"class_labels": labels}, {"class_labels": anything}
    with torch.no_grad():
        denoiser = halton.denoiser_for((GRID, GRID), 7, *conditions, 2.5, "constant")
        logits, chosen = denoiser(ids, 0.3), ids == HALTON_CODES
        at_masks = denoiser(ids, 0.3, chosen)
    expected = u + 2.5 * (c - u)
    assert (c - u).abs().max() > 0.1
    assert torch.allclose(logits[..., :-1].double(), expected[..., :-1], atol=2e-4)
    assert (logits[..., -1] == -math.inf).all()
    assert torch.allclose(at_masks.logits, logits[chosen], atol=1e-5)


def test_halton_samples(halton: DiscreteImagePipeline, tmp_path: Path) -> None:
    arguments = {"class_labels": [0, 2], "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt"}
    output = halton(**arguments, generator=seeded())
    assert output.images.shape == (2, 3, 4 * GRID, 4 * GRID)
    assert (output.sequences < HALTON_CODES).all()
    halton.save_pretrained(tmp_path)
    loaded = DiscreteImagePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    again = loaded(**arguments, generator=seeded())
    assert torch.equal(again.sequences, output.sequences)
    assert torch.equal(again.images, output.images)


def test_llamagen_decoder_and_encoder(halton: DiscreteImagePipeline) -> None:
    reference = LlamaGenReference(drawn(VQ_SHAPES, 1))
    ids, pixels = (
        torch.randint(0, HALTON_CODES, (2, 3, 4), generator=seeded()),
        torch.rand(2, 3, 12, 16, generator=seeded()),
    )
    with torch.no_grad():
        decoded, encoded = decode(halton.decoder, ids, True), encode(halton.decoder, pixels, True)
    expected = reference.decode(ids)
    assert expected.std() > 0.1
    assert torch.allclose(decoded.double(), expected, atol=1e-4)
    assert torch.equal(encoded, reference.encode(pixels))
    assert len(encoded.unique()) > 3


@pytest.mark.parametrize(
    ("file", "width", "layers", "grid", "millions"),
    [
        ("ImageNet_256_tiny.pth", 384, 6, 16, 23.0),
        ("ImageNet_256_small.pth", 512, 12, 16, 69.3),
        ("ImageNet_256_base.pth", 768, 12, 16, 142.2),
        ("ImageNet_384_large.pth", 1024, 24, 24, 480.0),
    ],
)
def test_published_sizes(file: str, width: int, layers: int, grid: int, millions: float) -> None:
    """Parameters as the authors count them, the head's table once; the network has the published keys but for it."""
    assert file in HALTON_FILES
    shapes = halton_shapes(16384, width, layers, HALTON_HEADS[width], grid, 1000)
    with torch.device("meta"):
        network = HaltonMaskGITModel(
            hidden_size=width,
            num_layers=layers,
            num_heads=HALTON_HEADS[width],
            intermediate_size=shapes["transformer.layers.0.ff.w1.weight"][0],
            grid_size=grid,
        )
    counted = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    assert counted == {key: shape for key, shape in shapes.items() if key != "head.weight"}
    assert round(sum(map(math.prod, counted.values())) / 1e6, 1) == millions


def test_published_decoder() -> None:
    """344 keys and 71.9 million parameters, all of which find their place."""
    shapes = llamagen_shapes((128, 128, 256, 256, 512), 256, 16384, 65536)
    assert len(shapes) == 344
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    decoder = llamagen_decoder(state, Path("vq_ds16_c2i.pt"))
    assert round(sum(p.numel() for p in decoder.parameters()) / 1e6, 1) == 71.9


# ---- files that do not fit -------------------------------------------------------------------------------------------


class Payload:
    def __reduce__(self) -> tuple:
        return print, ("a pickle ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickled({"model_state_dict": Payload()}), "holds more than tensors"),
        (pickled({"state_dict": {}}), "has no table of tensors 'model_state_dict'"),
        (
            pickled({"model_state_dict": {"weight": torch.zeros(1)}}),
            "is not of Halton-MaskGIT: it lacks tok_emb.weight",
        ),
        (halton_file()[:5000], "is damaged"),
        (pickled({"model_state_dict": halton_state() | {"head.weight": torch.zeros(33, WIDTH)}}), "a head that is not"),
        (
            pickled({"model_state_dict": halton_state() | {"more.weight": torch.zeros(1)}}),
            "does not fit: .*more.weight",
        ),
    ],
    ids=["payload", "no table", "another network", "damaged", "head", "unexpected"],
)
def test_halton_files_that_are_refused(
    content: bytes, message: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        load_halton(str(tmp_path), "a.pth", vq_model(), None, {})
    assert "a pickle ran" not in capfd.readouterr().out


def test_repositories_that_are_refused(halton_folder: Path, amused_folder: Path, tmp_path: Path) -> None:
    load = DiscreteImagePipeline.from_pretrained
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match=r"a model_index\.json of FluxPipeline; known are"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"has no model_index\.json; known are"):
        load(halton_folder)
    with pytest.raises(ValueError, match=r"has no file 'x\.pth'; published: ImageNet_256_tiny\.pth"):
        load(halton_folder, weight_name="x.pth")
    with pytest.raises(ValueError, match="`custom_pipeline` is not an argument"):
        load(amused_folder, custom_pipeline="a", device_map="cpu")
    with pytest.raises(ValueError, match=r"`device_map` is 'auto'; for .*, name one device"):
        load(amused_folder, device_map="auto")
    with pytest.raises(ValueError, match="is of AmusedPipeline, for images: load it with DiscreteImagePipeline"):
        DiscreteDiffusionPipeline.from_pretrained(amused_folder)
    with pytest.raises(ValueError, match="is not bundled; bundled:"):
        load("discrete-schedulers/no-such-image")
    for model in ("discrete-schedulers/tiny-text", Path(discrete_schedulers.__file__).parent / "assets" / "tiny-text"):
        with pytest.raises(ValueError, match=r"tiny-text' is of .*, for texts: load it with DiscreteDiffusionPipeline"):
            load(model)


# ---- by their id, from a Hub -----------------------------------------------------------------------------------------

CLIENT = """
import sys, torch
from discrete_schedulers import DiscreteImagePipeline
results = {}
for name, (repo, load, call) in torch.load(sys.argv[1]).items():
    try:
        pipe = DiscreteImagePipeline.from_pretrained(repo, **load)
        pipe.set_progress_bar_config(disable=True)
        output = pipe(**call, generator=torch.Generator().manual_seed(0), output_type="pt")
        results[name] = (output.sequences, output.images)
    except Exception as error:
        results[name] = f"{type(error).__name__}: {error}"
torch.save(results, sys.argv[2])
"""


@pytest.mark.slow
def test_loaded_by_id(
    pipe: DiscreteImagePipeline,
    meissonic: DiscreteImagePipeline,
    halton: DiscreteImagePipeline,
    amused_folder: Path,
    meissonic_folder: Path,
    halton_folder: Path,
    tmp_path: Path,
) -> None:
    text = {"prompt": "a cat", "num_inference_steps": 3, "guidance_scale": 2.0}
    classes = {"class_labels": 1, "num_inference_steps": 3, "guidance_scale": 2.0}
    named = {"weight_name": "ImageNet_256_tiny.pth", "torch_dtype": torch.float32}
    jobs = {
        "amused": ("amused/amused-256", {}, text),
        "meissonic": ("MeissonFlow/Meissonic", {}, text | {"height": 8, "width": 8}),
        "halton": (HALTON_REPOSITORY, named, classes),
        "unnamed": (HALTON_REPOSITORY, {}, classes),
        "no file": (HALTON_REPOSITORY, {"weight_name": "ImageNet_512_tiny.pth"}, classes),
    }
    torch.save(jobs, tmp_path / "jobs.pt")
    with LoopbackHub(home=tmp_path / "home") as hub:
        for name, folder in (("amused/amused-256", amused_folder), ("MeissonFlow/Meissonic", meissonic_folder)):
            publish(hub, name, {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()})
        publish(hub, HALTON_REPOSITORY, {"ImageNet_256_tiny.pth": halton_file()})
        publish(hub, "FoundationVision/LlamaGen", {"vq_ds16_c2i.pt": (halton_folder / "vq_ds16_c2i.pt").read_bytes()})
        hub.python(CLIENT, tmp_path / "jobs.pt", tmp_path / "results.pt", token=None)
    results = torch.load(tmp_path / "results.pt")
    for name, ours in (("amused", pipe), ("meissonic", meissonic), ("halton", halton)):
        expected = ours(**jobs[name][2], generator=seeded(), output_type="pt")
        assert not isinstance(results[name], str), results[name]
        assert torch.equal(results[name][0], expected.sequences)
        assert torch.equal(results[name][1], expected.images)
    assert results["unnamed"].startswith(
        "ValueError: `weight_name` is required for 'llvictorll/Halton-MaskGIT'; published:"
    )
    assert "has no file 'ImageNet_512_tiny.pth'" in results["no file"]
