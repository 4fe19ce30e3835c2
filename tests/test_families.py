"""Repositories as they are on the Hub (config.json, weights, no model_index.json), served from loopback and loaded by their id.

Each family's repository is written here with the published config fields, key names and file formats, scaled down, with random
weights; a client process loads all of them. What it got is held against the formula of the network in float64, or against
transformers' own class with the same weights and a full attention mask.
"""

from __future__ import annotations

import base64
import itertools
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hub import LoopbackHub, Repository
from safetensors.torch import load, save
from test_ddit import published_shapes, reference
from test_diffusion_gemma import template as gemma_template
from test_diffusion_gemma import tiny_gemma
from tiny import MASK, WORDS, randomised, tiny_tokenizer
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

from discrete_schedulers import AncestralScheduler, DiscreteDiffusionPipeline
from discrete_schedulers.models.checkpoints import denoiser_facts, find_family
from discrete_schedulers.models.loading import build_network, longest_sequence

V, LENGTH, TIME, BLOCK = len(WORDS), 8, 0.4, 3
SIGMA = -torch.log(torch.tensor(1 - (1 - 1e-3) * TIME, dtype=torch.float64))
IDS = torch.randint(2, V - 1, (3, LENGTH), generator=torch.Generator().manual_seed(1))
IDS[:, 2:5] = MASK

# ---- the published config.json files, as far as they matter ----------------------------------------------------------

HYDRA = {
    "tokens": 50257,
    "graph": {"type": "absorb", "file": "data", "report_all": False},
    "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20},
    "sampling": {"predictor": "euler", "steps": 128, "noise_removal": True},
    "training": {"batch_size": 512, "ema": 0.9999},
}
SEDD_MODEL = {"name": "small", "type": "ddit", "hidden_size": 768, "cond_dim": 128, "length": 1024, "n_blocks": 12}
SEDD_MODEL |= {"n_heads": 12, "scale_by_sigma": True, "dropout": 0.1}
SEDD = HYDRA | {"model": SEDD_MODEL}
RADD_MODEL = {name: value for name, value in SEDD_MODEL.items() if name not in ("scale_by_sigma", "cond_dim")}
RADD = HYDRA | {"model": RADD_MODEL | {"type": "ddit_wot", "dropout": 0.02}}
MDLM = {"model_type": "mdlm", "architectures": ["MDLM"], "cond_dim": 128, "hidden_dim": 768, "n_blocks": 12}
MDLM |= {"n_heads": 12, "model_length": 1024, "dropout": 0.1, "time_conditioning": False, "vocab_size": 50258}
MDLM |= {"return_dict": False, "torch_dtype": "float32", "transformers_version": "4.38.2"}
MDLM |= {"auto_map": {"AutoConfig": "configuration_mdlm.MDLMConfig", "AutoModelForMaskedLM": "modeling_mdlm.MDLM"}}
SDTT = {"model": SEDD_MODEL | {"type": "ddit-orig", "tie_word_embeddings": False}, "tokenizer": {"name": "gpt2"}}
SDTT |= {"time_conditioning": False, "parameterization": {"name": "multi-round-sdtt"}, "noise": {"type": "loglinear"}}
DUO = {name: value for name, value in MDLM.items() if name != "time_conditioning"}
DUO |= {
    "model_type": "DUO",
    "architectures": ["DUO"],
    "auto_map": {"AutoConfig": "DUOConfig"},
    "causal": False,
    "var_min": True,
}
UDLM = MDLM | {"model_type": "udlm", "architectures": ["UDLM"], "time_conditioning": True, "vocab_size": 30522}
UDLM |= {"model_length": 128, "cfg": False, "cfg_num_classes": -1}
LLADA = {"model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": 4096, "n_layers": 32, "n_heads": 32}
LLADA |= {
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "mask_token_id": 126336,
}
LLADA |= {"eos_token_id": 126081, "pad_token_id": 126081, "rope_theta": 500000.0, "max_sequence_length": 4096}
LLADA |= {"rms_norm_eps": 1e-5, "weight_tying": False, "block_type": "llama", "activation_type": "silu"}
LLADA |= {"auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"}}
DREAM = {"model_type": "Dream", "architectures": ["DreamModel"], "hidden_size": 3584, "num_hidden_layers": 28}
DREAM |= {"num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064}
DREAM |= {"mask_token_id": 151666, "pad_token_id": 151643, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6}
DREAM |= {"tie_word_embeddings": False, "max_position_embeddings": 131072, "use_cache": True, "bos_token_id": 151643}
DREAM |= {"auto_map": {"AutoModel": "modeling_dream.DreamModel"}, "hidden_act": "silu", "rope_scaling": None}
MMADA = LLADA | {"model_type": "mmada", "new_vocab_size": 134656, "codebook_size": 8192, "num_vq_tokens": 1024}
SEDD_UNIFORM = SEDD | {
    "graph": {"type": "simplex"},
    "noise": {"type": "geometric", "sigma_min": 1e-4, "sigma_max": 20},
    "model": SEDD_MODEL | {"scale_by_sigma": False},
}
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
DIFFULLAMA = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
DIFFULLAMA |= {"intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
A2D = {
    "model_type": "a2d-qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "head_dim": 128,
}
A2D |= {"num_key_value_heads": 8, "intermediate_size": 3072, "vocab_size": 151936, "max_position_embeddings": 40960}
A2D |= {"rope_theta": 1000000, "tie_word_embeddings": True, "rms_norm_eps": 1e-6}
BD3LM = MDLM | {"model_type": "bd3lm", "architectures": ["BD3LM"], "attn_backend": "sdpa", "block_size": 16}
BD3LM |= {"cross_attn": True, "sampling_eps_max": 0.999, "sampling_eps_min": 0.001, "var_min": True}
FAST_DLLM = {"model_type": "Fast_dLLM_Qwen", "architectures": ["Fast_dLLM_QwenForCausalLM"], "bd_size": 32}
FAST_DLLM |= {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2}
FAST_DLLM |= {"intermediate_size": 8960, "vocab_size": 151936, "rope_theta": 1000000.0, "tie_word_embeddings": True}
FAST_DLLM |= {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "use_sliding_window": False}
FAST_DLLM |= {"auto_map": {"AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM"}}
SDAR = {"model_type": "sdar", "architectures": ["SDARForCausalLM"], "attn_implementation": "flex_attention"}
SDAR |= {"block_size": 4, "mask_token_id": 151669, "head_dim": 128, "hidden_size": 2560, "intermediate_size": 9728}
SDAR |= {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936}
SDAR |= {"max_position_embeddings": 32768, "max_window_layers": 36, "rms_norm_eps": 1e-6, "rope_theta": 1000000}
SDAR |= {"tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": None, "debug": False}
SDAR |= {"auto_map": {"AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"}, "attention_bias": False}
DPLM = {
    "model_type": "esm",
    "architectures": ["ESM_HF_FLASHATTN"],
    "vocab_size": 33,
    "mask_token_id": 32,
    "pad_token_id": 1,
}
DPLM |= {"hidden_size": 640, "num_hidden_layers": 30, "num_attention_heads": 20, "intermediate_size": 2560}
DPLM |= {"position_embedding_type": "rotary", "token_dropout": True, "hidden_dropout_prob": 0.1}
DPLM |= {"max_position_embeddings": 1026, "emb_layer_norm_before": False, "layer_norm_eps": 1e-5}
BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 768, "num_hidden_layers": 12}
BERT |= {"num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 30522, "max_position_embeddings": 512}


class Published(NamedTuple):
    repo: str
    config: dict[str, Any]
    family: str
    vocab_size: int
    mask: int | None
    shift: int
    max_length: int
    parameters: int | None  # of the published size, counted in the files or by the authors
    block_size: int | None = None


# Numbers of the model cards and papers, not of the table.
PUBLISHED = [
    Published("louaaron/sedd-small", SEDD, "SEDD", 50258, 50257, 0, 1024, 169_627_218),
    Published("kuleshov-group/mdlm-owt", MDLM, "MDLM", 50258, 50257, 0, 1024, 169_627_218),
    Published("s-sahoo/duo", DUO, "DUO", 50258, None, 0, 1024, 169_627_218),
    Published("kuleshov-group/udlm-lm1b", UDLM, "UDLM", 30522, None, 0, 128, 139_292_986),
    Published("HuanranChen/SEDD-uniform-repaired", SEDD_UNIFORM, "SEDD-uniform", 50257, None, 0, 1024, 169_625_681),
    Published("Gen-Verse/MMaDA-8B-Base", MMADA, "MMaDA", 134656, 126336, 0, 4096, 8_082_690_048),
    Published("JingyangOu/radd-t-dce", RADD, "RADD", 50258, 50257, 0, 1024, 162_265_682),
    Published("jdeschena/sdtt", SDTT, "SDTT", 50258, 50257, 0, 1024, 169_627_218),
    Published(
        "jdeschena/sdtt",
        SDTT | {"model": SDTT["model"] | {"hidden_size": 1536, "n_blocks": 24, "n_heads": 16}},
        *("SDTT", 50258, 50257, 0, 1024, 863_158_098),
    ),
    Published("GSAI-ML/LLaDA-8B-Instruct", LLADA, "LLaDA", 126464, 126336, 0, 4096, 8_015_581_184),
    Published("Dream-org/Dream-v0-Instruct-7B", DREAM, "Dream", 152064, 151666, 1, 131072, 7_615_616_512),
    Published("apple/DiffuCoder-7B-Instruct", DREAM, "Dream", 152064, 151666, 1, 131072, 7_615_616_512),
    Published("diffusionfamily/diffugpt-s", GPT2, "DiffuGPT-s", 50257, 10541, 1, 1024, 124_439_808),
    Published(
        "diffusionfamily/diffugpt-m",
        GPT2 | {"n_embd": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 50258},
        *("DiffuGPT-m", 50258, 50257, 1, 1024, 354_824_192),
    ),
    Published("diffusionfamily/diffullama", DIFFULLAMA, "DiffuLLaMA", 32000, 811, 1, 4096, 6_738_415_616),
    Published("dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1", A2D, "A2D", 151936, 151669, 0, 40960, 596_049_920),
    *(
        Published(
            f"kuleshov-group/bd3lm-owt-block_size{size}{end}",
            BD3LM | {"block_size": size},
            *("BD3-LM", 50258, 50257, 0, 1024, 169_627_218, size),
        )
        for size, end in ((4, ""), (16, ""), (1024, "-pretrain"))
    ),
    Published("dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1", A2D, "A2D-BD3LM", 151936, 151669, 0, 40960, 596_049_920, 32),
    Published(
        "Efficient-Large-Model/Fast_dLLM_v2_1.5B",
        *(FAST_DLLM, "Fast-dLLM-v2", 151936, 151665, 1, 32768, 1_543_714_304, 32),
    ),
    Published("JetLM/SDAR-4B-Chat", SDAR, "SDAR", 151936, 151669, 0, 32768, 4_411_424_256, 4),
    Published("JetLM/SDAR-4B-Chat-b32", SDAR, "SDAR-b32", 151936, 151669, 0, 32768, 4_411_424_256, 32),
    Published("Gen-Verse/TraDo-4B-Instruct", SDAR, "SDAR", 151936, 151669, 0, 32768, 4_411_424_256, 4),
    Published("airkingbd/dplm_150m", DPLM, "DPLM", 33, 32, 0, 1026, None),
    Published("google-bert/bert-base-uncased", BERT, "masked language model", 30522, 103, 0, 512, 109_514_298),
]


LAWS = {  # what the network returns, where that is not x_0
    **dict.fromkeys(("SEDD", "SEDD-uniform"), "score"),
    **dict.fromkeys(("DUO", "UDLM"), "leave_one_out"),
}
NOISE = {  # where it is not linear
    "SEDD-uniform": "geometric",
    **dict.fromkeys(("SEDD", "RADD", "MDLM", "SDTT", "DUO", "UDLM", "BD3-LM"), "loglinear"),
}
TIMED = {"org/sedd", "org/sedd-uniform", "org/duo", "org/udlm", "org/udlm-classes"}  # the others are told no time


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: case.repo)
def test_table(case: Published) -> None:
    family = find_family(case.repo, case.config)
    assert family.name == case.family
    needs_tokenizer = case.mask if family.mask == "tokenizer" else None
    facts = denoiser_facts(family, case.config, case.vocab_size, mask_token_id=needs_tokenizer)
    assert (facts["vocab_size"], facts["mask_token_id"], facts["shift"]) == (case.vocab_size, case.mask, case.shift)
    assert facts["process"] == ("uniform" if case.mask is None else "absorbing")
    assert facts["parametrization"] == LAWS.get(case.family, "x0")
    assert facts["noise_schedule"] == NOISE.get(case.family, "linear")
    assert facts["block_size"] == case.block_size
    assert facts["attention"] == ("full" if case.block_size is None else "block_causal")
    network = build_network(family, case.config)
    assert network.config.vocab_size == case.vocab_size
    assert longest_sequence(network) == case.max_length
    tied = getattr(network, "all_tied_weights_keys", {})
    counted = sum(p.numel() for name, p in network.named_parameters() if name not in tied)
    assert case.parameters in (counted, None)
    assert {p.device.type for p in network.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("JetLM/SDAR-30B-A3B-Chat", SDAR),
        ("Dream-org/DreamReasoner-8B", DREAM),
        ("airkingbd/dplm2_650m", DPLM),
    ],
)
def test_look_alikes(name: str, config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is not supported: .* pass `family`"):
        find_family(name, config)
    assert find_family(name, config, "A2D").name == "A2D"


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("llada2_moe", "LLaDA2Pipeline takes our schedulers as BlockRefinementAdapter"),
    ],
)
def test_what_diffusers_has_a_pipeline_for(model_type: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"'me/mine' is not supported: .*{message}"):
        find_family("me/mine", {"model_type": model_type})


# ---- tiny repositories, their references -----------------------------------------------------------------------------


class Tiny(NamedTuple):
    """A repository, and what its network must return."""

    files: dict[str, bytes]
    expected: Tensor  # raw logits (B, L, V) of IDS at TIME
    family: str
    arguments: dict[str, Any] = {}
    ids: Tensor = IDS
    tolerance: float = 2e-5
    block_size: int | None = None


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def as_pickle(state: dict[str, Any], folder: Path, legacy: bool = False) -> bytes:
    torch.save(state, folder / "state.bin", _use_new_zipfile_serialization=not legacy)
    return (folder / "state.bin").read_bytes()


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """A tokenizer of `WORDS` with its mask named."""
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    return {path.name: path.read_bytes() for path in (folder / "tokenizer").iterdir()}


def ddit_state(vocab_size: int, cond_dim: int | None, classes: int | None = None) -> dict[str, Tensor]:
    """Random weights under the published names, nothing zero, and the published buffer."""
    generator = torch.Generator().manual_seed(2)
    shapes = published_shapes(vocab_size, 32, 2, 4, cond_dim, classes)
    return {key: 0.3 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def ddit_cases(folder: Path) -> dict[str, Tiny]:
    small = {"hidden_dim": 32, "n_blocks": 2, "n_heads": 4, "cond_dim": 16, "vocab_size": V, "model_length": 32}
    hydra = {"hidden_size": 32, "n_blocks": 2, "n_heads": 4, "length": 32}
    state, timeless = ddit_state(V, 16), ddit_state(V, None)
    classes = ddit_state(V, 16, classes=3)
    prefixed = {f"backbone.{key}": value for key, value in state.items()}
    twice = {f"backbone._orig_mod.{key}": value for key, value in state.items()}
    sigma, zero = SIGMA.expand(len(IDS)), torch.zeros(len(IDS))
    timed = reference(state, IDS, 4, sigma)
    words = {"tokens": V - 1}
    large = ddit_state(50258, 16)  # the width is the family's, not config.json's
    masked = IDS.masked_fill(IDS == MASK, 50257)
    sedd = SEDD | words | {"model": SEDD_MODEL | hydra | {"cond_dim": 16}}
    return {
        "org/mdlm": Tiny(
            {"config.json": as_json(MDLM | small), "model.safetensors": save(prefixed)},
            reference(state, IDS, 4, zero),
            "MDLM",
        ),
        "org/sedd": Tiny(
            {"config.json": as_json(sedd), "pytorch_model.bin": as_pickle(state, folder, legacy=True)}, timed, "SEDD"
        ),
        "org/bd3lm": Tiny(
            {
                "config.json": as_json(BD3LM | small | {"block_size": BLOCK}),
                "model.safetensors": save(prefixed | {f"sampling_eps_{m}": torch.tensor(0.5) for m in ("min", "max")}),
            },
            reference(state, IDS, 4, zero, block_size=BLOCK),
            "BD3-LM",
            block_size=BLOCK,
        ),
        "org/radd": Tiny(
            {
                "config.json": as_json(RADD | words | {"model": RADD_MODEL | {"type": "ddit_wot"} | hydra}),
                "model.safetensors": save(timeless),
            },
            reference(timeless, IDS, 4),
            "RADD",
        ),
        "org/sdtt": Tiny(
            {
                "config.json": as_json(SDTT | {"model": SDTT["model"] | hydra | {"cond_dim": 16}}),
                "model.safetensors": save({f"backbone.backbone.{key}": value for key, value in large.items()}),
            },
            reference(large, masked, 4, zero),
            "SDTT",
            {"revision": "baselines_kld_step_70000"},
            masked,
        ),
        "org/sedd-uniform": Tiny(
            {
                "config.json": as_json(
                    SEDD_UNIFORM | {"tokens": V, "model": SEDD_UNIFORM["model"] | hydra | {"cond_dim": 16}}
                ),
                "model.safetensors": save(
                    {
                        re.sub(r"(?<=blocks.\d).mlp.([02])", lambda m: f".mlp.fc{1 + int(m[1]) // 2}", key).replace(
                            "sigma_map", "cond_map"
                        ): value
                        for key, value in state.items()
                    }
                ),
            },
            reference(state, IDS, 4, torch.tensor(1e-4 ** (1 - TIME) * 20**TIME).expand(len(IDS))),
            "SEDD-uniform",
        ),
        "org/duo": Tiny({"config.json": as_json(DUO | small), "model.safetensors": save(twice)}, timed, "DUO"),
        "org/udlm": Tiny(
            {"config.json": as_json(UDLM | small), "model.safetensors": save(prefixed)},
            timed,
            "UDLM",
            {"tokenizer": None},
        ),
        "org/udlm-classes": Tiny(
            {
                "config.json": as_json(UDLM | small | {"cfg": True, "cfg_num_classes": 3}),
                "model.safetensors": save({f"backbone.{key}": value for key, value in classes.items()}),
            },
            reference(classes, IDS, 4, sigma, torch.tensor([3, 3, 3])),
            "UDLM",
            {
                "tokenizer": None,
                "denoiser": {"call_arguments": {"class_labels": [3]}},
            },  # any class, where none is named
        ),
    }


def full(model: Any, ids: Tensor) -> Tensor:
    """Logits of a causal model under a mask that hides nothing: transformers' other way to the same attention."""
    with torch.no_grad():
        return model(ids, attention_mask=torch.zeros(1, 1, ids.shape[1], ids.shape[1]), use_cache=False).logits


def by_blocks(model: Any, ids: Tensor) -> Tensor:
    """Logits of a causal model where nothing sees a later block of `BLOCK`."""
    hidden = torch.zeros(1, 1, ids.shape[1], ids.shape[1])
    for q, k in itertools.product(range(ids.shape[1]), repeat=2):
        hidden[..., q, k] = -1e9 if k // BLOCK > q // BLOCK else 0.0
    with torch.no_grad():
        return model(ids, attention_mask=hidden, use_cache=False).logits


def native(model_type: str, head: Any, **values: Any) -> Any:
    """transformers' own class, tiny, with random weights; its head follows its embedding where the config says so."""
    model = randomised(head.from_config(CONFIG_MAPPING[model_type](**values)), seed=3)
    model.tie_weights()
    return model


def sharded(state: dict[str, Tensor]) -> dict[str, bytes]:
    """Two safetensors files and their index."""
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    index = {"metadata": {}, "weight_map": {name: part for part, some in parts.items() for name in some}}
    files = {part: save({name: state[name].contiguous().clone() for name in some}) for part, some in parts.items()}
    return files | {"model.safetensors.index.json": as_json(index)}


def one_file(state: dict[str, Tensor]) -> dict[str, bytes]:
    return {"model.safetensors": save({name: value.contiguous().clone() for name, value in state.items()})}


WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LLADA_LAYER = {  # transformers' name -> the published one, from the model card's side
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
LLADA_TOP = {"model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "ff_out"}


def llada_key(key: str) -> str:
    name = key.removesuffix(".weight")
    if name in LLADA_TOP:
        return f"model.transformer.{LLADA_TOP[name]}.weight"
    _, _, number, inner = name.split(".", 3)
    return f"model.transformer.blocks.{number}.{LLADA_LAYER[inner]}.weight"


def causal_cases(folder: Path) -> dict[str, Tiny]:
    """LLaDA, Dream, DiffuGPT, DiffuLLaMA, A2D: V + 2 columns, two more than the tokenizer has."""
    padded, words = V + 2, tokenizer_files(folder)
    backend = tiny_tokenizer().backend_tokenizer
    unnamed = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", eos_token="[PAD]")
    unnamed.save_pretrained(folder / "unnamed")
    llama_config = WIDTH | {
        "vocab_size": padded,
        "rope_theta": 500.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
    }
    llama = native("llama", AutoModelForCausalLM, **llama_config)
    llada = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 48, "vocab_size": padded}
    llada |= {"embedding_size": padded, "mask_token_id": MASK, "rope_theta": 500.0, "max_sequence_length": 64}
    llada |= {"eos_token_id": 0, "pad_token_id": 0}
    qwen = {**WIDTH, "vocab_size": padded, "num_key_value_heads": 2, "rope_theta": 700.0, "max_position_embeddings": 64}
    qwen |= {"mask_token_id": MASK, "bos_token_id": 0, "pad_token_id": 0, "rms_norm_eps": 1e-6}
    dream = native("qwen2", AutoModelForCausalLM, **qwen, tie_word_embeddings=False)
    qwen3 = qwen | {"head_dim": 8, "tie_word_embeddings": True}
    del qwen3["mask_token_id"]
    a2d = native("qwen3", AutoModelForCausalLM, **qwen3)
    small_qwen = qwen | {"bd_size": BLOCK, "tie_word_embeddings": True}
    del small_qwen["mask_token_id"]
    fast = native("qwen2", AutoModelForCausalLM, **small_qwen)
    untied = {key: value for key, value in fast.state_dict().items() if key != "lm_head.weight"}
    sdar = qwen3 | {"mask_token_id": MASK, "block_size": BLOCK, "tie_word_embeddings": False}
    sdar_model = native("qwen3", AutoModelForCausalLM, **sdar)
    gpt = {
        "vocab_size": V,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    gpt2 = native("gpt2", AutoModelForCausalLM, **gpt).half()
    gpt2_state = {
        "embed_tokens.weight"
        if key == "transformer.wte.weight"
        else key.replace("transformer.", "denoise_model."): value
        for key, value in gpt2.state_dict().items()
        if key != "lm_head.weight"
    }
    plain = native("llama", AutoModelForCausalLM, **WIDTH, vocab_size=V, max_position_embeddings=64)
    plain_files = {"config.json": as_json(DIFFULLAMA | WIDTH | {"vocab_size": V, "rms_norm_eps": 1e-6})}
    both = {"family": "DiffuLLaMA", "mask_token_id": MASK, "tokenizer": None}
    dream_files = {"config.json": as_json(DREAM | qwen), **sharded(dream.state_dict()), **DREAM_TOKENIZER}
    return {
        "org/llada": Tiny(
            {
                "config.json": as_json(LLADA | llada),
                **sharded({llada_key(key): value for key, value in llama.state_dict().items()}),
                **{path.name: path.read_bytes() for path in (folder / "unnamed").iterdir()},
            },
            full(llama, IDS),
            "LLaDA",
        ),
        "org/mmada": Tiny(
            {
                "config.json": as_json(
                    MMADA | llada | {"vocab_size": V, "embedding_size": V, "new_vocab_size": padded}
                ),
                **sharded({llada_key(key): value for key, value in llama.state_dict().items()}),
                **words,
            },
            full(llama, IDS),
            "MMaDA",
            {"mask_token_id": MASK},
        ),
        "org/dream": Tiny(dream_files, full(dream, IDS), "Dream"),
        "org/diffugpt": Tiny(
            {"config.json": as_json(GPT2 | gpt), **one_file(gpt2_state), **words},
            full(gpt2.float(), IDS),
            "DiffuGPT-s",
            {"family": "DiffuGPT-s", "mask_token_id": MASK, "dtype": torch.float32},
        ),
        "org/diffugpt-m": Tiny(
            {"config.json": as_json(GPT2 | gpt), **one_file(gpt2_state), **words},
            full(gpt2.float(), IDS),
            "DiffuGPT-m",
            {"family": "DiffuGPT-m", "mask_token_id": MASK, "dtype": torch.float32},
        ),
        "org/diffullama": Tiny(
            {**plain_files, "pytorch_model.bin": as_pickle(plain.state_dict(), folder)},
            full(plain, IDS),
            "DiffuLLaMA",
            both,
        ),
        "org/a2d": Tiny(
            {"config.json": as_json(A2D | qwen3), **one_file(a2d.state_dict()), **words}, full(a2d, IDS), "A2D"
        ),
        "org/a2d-qwen2": Tiny(
            {
                "config.json": as_json(A2D | small_qwen | {"model_type": "a2d-qwen2", "head_dim": 8}),
                **one_file(untied),
                **words,
            },
            full(fast, IDS),
            "A2D",
        ),
        "org/a2d-llama": Tiny(
            {
                "config.json": as_json({"model_type": "a2d-llama", "mask_token_id": 5} | llama_config),
                **one_file(llama.state_dict()),
                **words,
            },
            full(llama, IDS),
            "A2D",
        ),
        "org/a2d-bd3lm": Tiny(
            {"config.json": as_json(A2D | qwen3), **one_file(a2d.state_dict()), **words},
            by_blocks(a2d, IDS),
            "A2D-BD3LM",
            {"family": "A2D-BD3LM", "denoiser": {"block_size": BLOCK}},
            block_size=BLOCK,
        ),
        "org/fast-dllm": Tiny(
            {"config.json": as_json(FAST_DLLM | small_qwen), **one_file(untied), **DREAM_TOKENIZER},
            by_blocks(fast, IDS),
            "Fast-dLLM-v2",
            {"mask_token_id": MASK},
            block_size=BLOCK,
        ),
        "org/sdar": Tiny(
            {"config.json": as_json(SDAR | sdar), **sharded(sdar_model.state_dict()), **DREAM_TOKENIZER},
            by_blocks(sdar_model, IDS),
            "SDAR",
            block_size=BLOCK,
        ),
        "org/a2d-bf16": Tiny(
            {"config.json": as_json(A2D | qwen3), **one_file(a2d.state_dict()), **words},
            full(a2d.bfloat16(), IDS),
            "A2D",
            {"torch_dtype": torch.bfloat16, "device_map": "cpu"},
            tolerance=0.1,
        ),
    }


# Byte-level pairs: 19 letters, three specials. What is published as remote code is the class, not the files.
LETTERS = "abcdefghijklmnopqrs"
DREAM_TOKENIZER = {
    "vocab.json": as_json(
        {letter: i + 2 for i, letter in enumerate(LETTERS)} | {"<|pad|>": 0, "<|x|>": 1, "<|mask|>": MASK}
    ),
    "merges.txt": b"#version: 0.2\n",
    "tokenizer_config.json": as_json(
        {
            "tokenizer_class": "DreamTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
            "added_tokens_decoder": {
                str(i): {"content": token, "special": True, "lstrip": False, "rstrip": False, "normalized": False}
                for i, token in ((0, "<|pad|>"), (MASK, "<|mask|>"))
            },
            "mask_token": "<|mask|>",
            "pad_token": "<|pad|>",
            "unk_token": None,
            "eos_token": "<|pad|>",
        }
    ),
}


def masked_cases(folder: Path) -> dict[str, Tiny]:
    """BERT with its old names and the heads that are not ours, RoBERTa, ModernBERT without its tied head, ESM2, DPLM."""
    words = tokenizer_files(folder)
    small = WIDTH | {"vocab_size": V, "max_position_embeddings": 64, "pad_token_id": 0}
    bert = native("bert", AutoModelForMaskedLM, **small)
    roberta = native("roberta", AutoModelForMaskedLM, **small | {"pad_token_id": 1})
    modern_config = small | {"local_attention": 4, "global_attn_every_n_layers": 2, "num_hidden_layers": 3}
    modern_config |= dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    modern = native("modernbert", AutoModelForMaskedLM, **modern_config)
    esm_config = DPLM | WIDTH | {"num_hidden_layers": 2, "max_position_embeddings": 64}
    ours = {name: value for name, value in esm_config.items() if name not in ("model_type", "architectures")}
    esm = native("esm", AutoModelForMaskedLM, **ours)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def bert_key(key: str) -> str:
        for new, was in old.items():
            key = key.replace(new, was)
        return key

    bert_state = {bert_key(key): value for key, value in bert.state_dict().items() if "decoder" not in key}
    bert_state |= {"bert.pooler.dense.weight": torch.ones(32, 32), "cls.seq_relationship.weight": torch.ones(2, 32)}
    esm_state = {key: value for key, value in esm.state_dict().items() if "inv_freq" not in key}
    esm_state |= {f"esm.encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq": torch.ones(4) for i in range(2)}
    esm_state |= {
        "esm.contact_head.regression.weight": torch.ones(1, 8),
        "esm.embeddings.position_ids": torch.ones(1, 64),
    }
    protein = torch.randint(4, 24, (3, LENGTH), generator=torch.Generator().manual_seed(4))
    protein[:, 0], protein[:, -1], protein[:, 2:5] = 0, 2, 32
    with torch.no_grad():
        answers = {
            name: model(IDS).logits for name, model in [("bert", bert), ("roberta", roberta), ("modern", modern)]
        }
        residues = esm(protein).logits
    bert_config = {"model_type": "bert", "architectures": ["BertForMaskedLM"]} | small
    roberta_config = {"model_type": "roberta"} | small | {"pad_token_id": 1}
    return {
        "org/bert": Tiny(
            {"config.json": as_json(bert_config), **one_file(bert_state), **words},
            answers["bert"],
            "masked language model",
        ),
        "org/roberta": Tiny(
            {"config.json": as_json(roberta_config), **one_file(roberta.state_dict()), **words},
            answers["roberta"],
            "masked language model",
        ),
        "org/modernbert": Tiny(
            {
                "config.json": as_json({"model_type": "modernbert"} | modern_config),
                **one_file({key: value for key, value in modern.state_dict().items() if key != "decoder.weight"}),
                **words,
            },
            answers["modern"],
            "masked language model",
        ),
        "org/esm2": Tiny(
            {"config.json": as_json(esm_config | {"architectures": ["EsmForMaskedLM"]}), **one_file(esm_state)},
            residues,
            "masked language model",
            {"mask_token_id": 32},
            protein,
        ),
        "org/dplm": Tiny(
            {
                "config.json": as_json(esm_config | {"dplm_type": "dplm_esm"}),
                "pytorch_model.bin": as_pickle(esm_state, folder),
            },
            residues,
            "DPLM",
            {},
            protein,
        ),
    }


# ---- one client process loads them all -------------------------------------------------------------------------------

CLIENT = """
import sys, tempfile, torch
from discrete_schedulers import DiscreteDiffusionPipeline
from discrete_schedulers.pipelines.text import prefix_frame

jobs, results = torch.load(sys.argv[1]), {}
for name, (repo, arguments, ids) in jobs.items():
    try:
        pipe = DiscreteDiffusionPipeline.from_pretrained(repo, **arguments)
        pipe.set_progress_bar_config(disable=True)
        if repo == "org/diffusiongemma":  # it has no logits of ids alone
            sampled = pipe(template=ids, num_inference_steps=3, generator=torch.Generator().manual_seed(0))
            results[name] = {"sequences": sampled.sequences, "state": pipe.model.state_dict()}
            continue
        with torch.no_grad():
            raw = pipe.denoiser.raw(ids, 0.4)
            result = {"raw": raw, "logits": pipe.denoiser(ids, 0.4), "facts": dict(pipe.config.denoiser)}
            sees = []  # which logits change with which token
            for i in range(ids.shape[1]):
                other = ids.clone()
                other[:, i] = 4 + (ids[:, i] == 4)
                sees.append((pipe.denoiser.raw(other, 0.4) != raw).any(-1).all(0))
        result |= {"sees": torch.stack(sees), "dtype": pipe.model.dtype, "training": pipe.model.training}
        result["mask_token"] = pipe.tokenizer and pipe.tokenizer.mask_token
        with tempfile.TemporaryDirectory() as folder:
            pipe.save_pretrained(folder)
            loaded = DiscreteDiffusionPipeline.from_pretrained(folder, torch_dtype=pipe.model.dtype)
            with torch.no_grad():
                result["reloaded"] = loaded.denoiser.raw(ids, 0.4)
        mask = pipe.config.denoiser["mask_token_id"]
        template = ids.clone() if mask is None else ids.masked_fill(ids == mask, -1)
        template[:, 3] = -1
        if pipe.config.denoiser["attention"] == "block_causal":  # no block sees a later one
            template[:, 2:] = -1
        sampled = pipe(template=template, num_inference_steps=3, generator=torch.Generator().manual_seed(0))
        result |= {"sequences": sampled.sequences, "texts": sampled.texts, "template": template}
        frame, seed = prefix_frame([[5, 6, 7, 8], [9]], None, 4), torch.Generator().manual_seed(0)
        x = frame.known.masked_fill(frame.known < 0, 4 if mask is None else mask)
        with torch.no_grad():
            padded = pipe.denoiser.raw(x, 0.4, **pipe.prepare_padding(frame))
            result |= {"padded": padded[1:, :5], "alone": pipe.denoiser.raw(x[1:, :5], 0.4)}
        guide = {"class_labels": 1} if name == "org/udlm-classes" else {}
        # By the class, or by what is known. That of an ESM without tokenizer has its start token among it: NaN without.
        if guide or (mask is not None and name != "org/esm2"):
            guided = pipe(template=template, guidance_scale=2.0, num_inference_steps=3, generator=seed, **guide)
            result["guided_calls"] = guided.num_model_calls
        result["eos"] = pipe.config.eos_token_id
        results[name] = result
    except Exception as error:
        lines = [type(e).__name__ for e in (error, error.__cause__) if e is not None]
        results[name] = {"error": " from ".join(lines), "message": str(error)}
torch.save(results, sys.argv[2])
"""


def publish(hub: LoopbackHub, repo_id: str, files: dict[str, bytes], private: bool = False) -> None:
    """Put a repository on the Hub."""
    hub.repos[repo_id] = repository = Repository(repo_id, private)
    operations: list[dict[str, Any]] = [{"key": "header", "value": {"summary": "files"}}]
    for path, content in files.items():
        operations.append({"key": "file", "value": {"path": path, "content": base64.b64encode(content).decode()}})
    repository.commit(operations)


def run_client(hub: LoopbackHub, jobs: dict[str, tuple], folder: Path) -> dict[str, dict]:
    """What a process that has this Hub for its own got: results of `CLIENT` by the names of the jobs."""
    torch.save(jobs, folder / "jobs.pt")
    hub.python(CLIENT, folder / "jobs.pt", folder / "results.pt", token=None)
    return torch.load(folder / "results.pt")


TINY: dict[str, Callable[[Path], dict[str, Tiny]]] = {
    "DDiT": ddit_cases,
    "causal": causal_cases,
    "masked": masked_cases,
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tiny]:
    folder = tmp_path_factory.mktemp("made")
    return {name: case for make in TINY.values() for name, case in make(folder).items()}


@pytest.fixture(scope="module")
def results(cases: dict[str, Tiny], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("client")
    with LoopbackHub(home=folder / "home") as hub:
        publish(hub, "openai-community/gpt2", tokenizer_files(folder))
        for name, case in cases.items():
            publish(hub, name, case.files)
            if "revision" in case.arguments:  # main has a README only
                repository = hub.repos[name]
                repository.branches[case.arguments["revision"]] = repository.head
                publish(hub, name, {"README.md": b"# on branches"})
                hub.repos[name].branches = repository.branches
        jobs = {name: (name, case.arguments, case.ids) for name, case in cases.items()}
        tiny_gemma().save_pretrained(folder / "gemma")
        files = {path.name: path.read_bytes() for path in (folder / "gemma").iterdir()}
        publish(hub, "org/diffusiongemma", files | tokenizer_files(folder))
        jobs["org/diffusiongemma"] = ("org/diffusiongemma", {}, gemma_template(2))
        return run_client(hub, jobs, folder)


NAMES = """org/sdtt org/mdlm org/sedd org/sedd-uniform org/radd org/duo org/udlm org/udlm-classes org/llada org/mmada
org/dream org/diffugpt org/diffugpt-m org/diffullama org/a2d org/a2d-qwen2 org/a2d-llama org/a2d-bf16
org/a2d-bd3lm org/fast-dllm org/sdar org/bd3lm org/bert org/roberta org/modernbert org/esm2 org/dplm""".split()


def test_all_are_tested(cases: dict[str, Tiny]) -> None:
    assert sorted(cases) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_loaded_by_id(name: str, cases: dict[str, Tiny], results: dict[str, dict]) -> None:
    case, result = cases[name], results[name]
    assert "error" not in result, result
    assert case.expected.abs().max() > 0.5
    torch.testing.assert_close(result["raw"].double(), case.expected.double(), rtol=0, atol=case.tolerance)
    block = torch.arange(LENGTH) // (case.block_size or LENGTH)
    assert torch.equal(result["sees"], block[:, None] <= block), "a position sees what it must not, or not what it must"
    assert not result["training"]
    torch.testing.assert_close(result["reloaded"], result["raw"], rtol=0, atol=case.tolerance)
    torch.testing.assert_close(result["padded"], result["alone"], rtol=0, atol=10 * case.tolerance)
    unguided = ("org/duo", "org/udlm", "org/sedd-uniform", "org/esm2")
    assert result.get("guided_calls") == (None if name in unguided else 6)
    assert result["eos"] == ([0] if name in ("org/llada", "org/dream") else None)  # their tokenizer's
    kept = result["template"] >= 0
    assert (result["sequences"] == result["template"])[kept].all()
    mask, never = result["facts"]["mask_token_id"], result["facts"]["suppress_token_ids"]
    drawn = result["sequences"][~kept]
    assert not set(drawn.tolist()) & {mask, *never}


def test_prompt_and_canvas_loaded_by_id(results: dict[str, dict]) -> None:
    """DiffusionGemma: every parameter and saved buffer, and samples; its logits are in test_diffusion_gemma.py."""
    result, state, known = results["org/diffusiongemma"], tiny_gemma().state_dict(), gemma_template(2)
    assert "error" not in result, result
    assert result["state"].keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in result["state"].items())
    assert (result["sequences"] == known)[known >= 0].all()
    assert (result["sequences"] >= 0).all()


def test_facts(cases: dict[str, Tiny], results: dict[str, dict]) -> None:
    """What no config.json says: tokens that are never drawn, the mask's name, the dtype of the files."""
    never = {name: tuple(results[name]["facts"]["suppress_token_ids"]) for name in NAMES}
    padding, specials = (V, V + 1), (0, 1)
    assert never == dict.fromkeys(NAMES, ()) | dict.fromkeys(
        (
            *("org/llada", "org/mmada", "org/dream", "org/a2d", "org/a2d-qwen2", "org/a2d-llama", "org/a2d-bf16"),
            *("org/a2d-bd3lm", "org/fast-dllm", "org/sdar"),
        ),
        padding,
    ) | (dict.fromkeys(("org/bert", "org/roberta", "org/modernbert"), specials) | {"org/dplm": (0, 1, 2, 24)})
    assert {name: results[name]["mask_token"] for name in ("org/llada", "org/dream", "org/mdlm", "org/dplm")} == {
        "org/llada": "[MASK]",
        "org/dream": "<|mask|>",
        "org/mdlm": "[MASK]",
        "org/dplm": None,
    }
    for name in NAMES:
        facts = results[name]["facts"]
        uniform = name in ("org/duo", "org/udlm", "org/udlm-classes", "org/sedd-uniform")
        mask = 50257 if name == "org/sdtt" else None if uniform else 32 if name in ("org/esm2", "org/dplm") else MASK
        assert facts.get("time_input") == ("sigma" if name in TIMED else None)
        assert (facts["mask_token_id"], facts["process"]) == (mask, "uniform" if uniform else "absorbing")
        assert results[name]["dtype"] == (torch.bfloat16 if name == "org/a2d-bf16" else torch.float32)
        assert find_family(
            name, json.loads(cases[name].files["config.json"]), cases[name].arguments.get("family")
        ).name == (cases[name].family)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("org/dream", "keep"),
        ("org/fast-dllm", "keep"),
        ("org/diffugpt", "copy"),
        ("org/diffugpt-m", "copy"),
        ("org/diffullama", "copy"),
    ],
)
def test_shift(name: str, first: str, results: dict[str, dict]) -> None:
    """Logits at i - 1 predict position i; position 0 keeps its own (Dream) or its token (DiffuGPT, DiffuLLaMA)."""
    raw, logits = results[name]["raw"], results[name]["logits"]
    tokens = slice(0, MASK)
    assert torch.equal(logits[:, 1:, tokens], raw[:, :-1, tokens])
    if first == "keep":
        assert torch.equal(logits[:, 0, tokens], raw[:, 0, tokens])
    else:
        assert torch.equal(logits[:, 0].argmax(-1), IDS[:, 0])
        assert (logits[:, 0].isfinite().sum(-1) == 1).all()


def test_tokenizer_of_the_family(results: dict[str, dict]) -> None:
    """The gpt2 that MDLM, SEDD, RADD and DUO name; none where the caller says so."""
    assert results["org/mdlm"]["texts"] == tiny_tokenizer().batch_decode(results["org/mdlm"]["sequences"], True)
    assert results["org/udlm"]["texts"] is None


@pytest.mark.parametrize("name", ["org/duo", "org/udlm"])
def test_uniform_posterior_is_the_published_one(name: str, results: dict[str, dict]) -> None:
    """Schiff et al. 2024, eq. 14, the network's softmax in the place of x_0, against our law with the loaded facts."""
    raw, facts = results[name]["raw"].double(), results[name]["facts"]
    assert facts["time_input"] == "sigma"
    scheduler = AncestralScheduler(vocab_size=V, process="uniform", noise_schedule="loglinear")
    scheduler.set_grid(torch.tensor([1.0, TIME, 0.25, 0.0], dtype=torch.float64))
    law = scheduler.transition(results[name]["logits"], TIME, IDS)

    alpha_t, alpha_s = 1 - (1 - 1e-3) * TIME, 1 - (1 - 1e-3) * 0.25
    alpha_ts, x = alpha_t / alpha_s, raw.softmax(-1)
    x_t = torch.nn.functional.one_hot(IDS, V).double()
    top = V * alpha_t * x_t * x + (alpha_ts - alpha_t) * x_t + (alpha_s - alpha_t) * x
    top = top + (alpha_s - alpha_t) * (1 - alpha_s) / (V * alpha_s)
    bottom = V * alpha_t * (x_t * x).sum(-1, keepdim=True) + 1 - alpha_t
    torch.testing.assert_close(law, top / bottom, rtol=1e-4, atol=1e-7)


# ---- faults ----------------------------------------------------------------------------------------------------------


class Code:
    """A pickle of it makes a folder where it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.marker,)


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("faults")
    good = ddit_cases(folder)["org/mdlm"].files
    state = {f"backbone.{key}": value for key, value in ddit_state(V, 16).items()}
    config = json.loads(good["config.json"])
    key = "backbone.blocks.1.attn_out.weight"
    shards = {"weight_map": {name: f"{1 + (name == key)}.safetensors" for name in state}}
    files = {
        "empty": {"README.md": b"# on branches"},
        "no-weights": {"config.json": good["config.json"]},
        "truncated": good | {"model.safetensors": good["model.safetensors"][:-100]},
        "half-a-pickle": {"config.json": good["config.json"], "pytorch_model.bin": as_pickle(state, folder)[:-2000]},
        "code": {"config.json": good["config.json"], "pytorch_model.bin": pickle.dumps({key: Code(folder / "ran")})},
        "code-in-zip": {
            "config.json": good["config.json"],
            "pytorch_model.bin": as_pickle({key: Code(folder / "ran")}, folder),
        },
        "nested": {"config.json": good["config.json"], "pytorch_model.bin": as_pickle({"model": state}, folder)},
        "no-json": good | {"config.json": good["config.json"][:-2]},
        "list": good | {"config.json": b"[]"},
        "shapes": good | {"config.json": as_json(config | {"vocab_size": V + 1})},
        "missing": good | {"model.safetensors": save({name: value for name, value in state.items() if name != key})},
        "unexpected": good | {"model.safetensors": save(state | {"backbone.blocks.1.lora.weight": torch.ones(2)})},
        "lost-shard": {
            "config.json": good["config.json"],
            "model.safetensors.index.json": as_json(shards),
            "1.safetensors": save({name: value for name, value in state.items() if name != key}),
        },
        "config": good | {"config.json": as_json({name: v for name, v in config.items() if name != "n_heads"})},
        "unknown": good | {"config.json": as_json({"model_type": "wave", "architectures": ["WaveNet"]})},
        "llada-moe": good | {"config.json": as_json({"model_type": "llada", "hidden_size": 2048, "num_experts": 64})},
        "declared": good | {"config.json": as_json(config | {"model_type": "mine"})},
    }
    arguments: dict[str, dict[str, Any]] = {name: {} for name in [*files, "gated", "private", "nothing"]}
    arguments["declared"] = {"family": "MDLM", "mask_token_id": 3}
    arguments |= {"no-family": {"family": "GPT"}, "no-mask": {"family": "DUO", "mask_token_id": 3}}
    arguments |= {"far-mask": {"family": "MDLM", "mask_token_id": V}, "nowhere": {"device_map": "nowhere"}}
    arguments |= {"revision": {"revision": "v9"}, "wrong-name": {"variant": "fp16"}}
    with LoopbackHub(home=folder / "home") as hub:
        publish(hub, "openai-community/gpt2", tokenizer_files(folder))
        for name, content in files.items():
            publish(hub, f"org/{name}", content)
        for name in ("no-family", "no-mask", "far-mask", "nowhere", "revision", "wrong-name", "gated"):
            publish(hub, f"org/{name}", good)
        publish(hub, "org/private", good, private=True)
        hub.repos["org/gated"].gated = True
        jobs = {name: (f"org/{name}", values, IDS) for name, values in arguments.items()}
        jobs["cached"] = ("org/declared", arguments["declared"] | {"local_files_only": True, "tokenizer": None}, IDS)
        jobs["granted"] = ("org/gated", {"token": hub.token}, IDS)
        results = run_client(hub, jobs, folder)
    assert not (folder / "ran").exists(), "code of a pickle was run"
    return results


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "empty",
            "ValueError",
            "'org/empty' has neither model_index.json nor config.json; if a branch .* pass `revision`",
        ),
        ("no-weights", "ValueError", "'org/no-weights' has no weights: looked for model.safetensors, "),
        ("truncated", "ValueError from SafetensorError", "model.safetensors is damaged .*download it again"),
        (
            "half-a-pickle",
            "ValueError from (RuntimeError|UnpicklingError|EOFError)",
            "pytorch_model.bin (is damaged|holds more)",
        ),
        ("code", "ValueError from UnpicklingError", "pytorch_model.bin holds more than tensors"),
        ("code-in-zip", "ValueError from UnpicklingError", "pytorch_model.bin holds more than tensors"),
        ("nested", "ValueError", "pytorch_model.bin is not a table of tensors"),
        ("no-json", "ValueError from JSONDecodeError", "config.json is not JSON"),
        ("list", "ValueError", "config.json holds a list"),
        ("shapes", "ValueError", r"wrong shapes: backbone.* is \(22, 32\), the config says \(23, 32\)"),
        ("missing", "ValueError", "do not fit family 'MDLM' and config.json: missing: blocks.1.attn_out.weight$"),
        ("unexpected", "ValueError", "unexpected: backbone.blocks.1.lora.weight$"),
        ("lost-shard", "ValueError", "lacks 2.safetensors, which model.safetensors.index.json names"),
        ("config", "ValueError", "config.json lacks n_heads, which checkpoints of family 'MDLM' have"),
        ("unknown", "ValueError", "model_type 'wave'.*code of a repository is never run.*family=.*'SEDD', .*'LLaDA'"),
        ("llada-moe", "ValueError", "is of no known family"),
        ("no-family", "ValueError", "`family` is 'GPT'; allowed: 'SEDD', "),
        ("no-mask", "ValueError", "`mask_token_id` is 3, but family 'DUO' has uniform noise"),
        ("far-mask", "ValueError", "`mask_token_id` is 22; allowed are 0 to 21"),
        ("nowhere", "ValueError from RuntimeError", "`device_map` is 'nowhere'; allowed: a device .*'auto'"),
        ("wrong-name", "ValueError", "`variant` is not an argument for 'org/wrong-name'"),
        ("revision", "RevisionNotFoundError.*", "404"),
        ("nothing", "RepositoryNotFoundError.*", "404"),
        ("private", "RepositoryNotFoundError.*", "401"),
        ("gated", "GatedRepoError.*", "401"),
        ("granted", "GatedRepoError.*", "403"),
    ],
)
def test_fault(name: str, error: str, message: str, faults: dict[str, dict]) -> None:
    result = faults[name]
    assert re.fullmatch(error, result.get("error", "none")), result
    assert re.search(message, result["message"], re.DOTALL), result


@pytest.mark.slow  # the client asks again and again
def test_unreachable(tmp_path: Path) -> None:
    with LoopbackHub(home=tmp_path / "home") as hub:
        pass  # nobody listens behind it
    result = run_client(hub, {"away": ("org/away", {}, IDS)}, tmp_path)["away"]
    missing = "the Hub cannot be reached, and model_index.json or config.json of 'org/away' is not in the local cache"
    assert result["message"] == missing, result


def test_declared(faults: dict[str, dict]) -> None:
    assert "error" not in faults["declared"], faults["declared"]
    assert faults["declared"]["facts"]["mask_token_id"] == 3


def test_cache_does_without_the_hub(faults: dict[str, dict]) -> None:
    assert "error" not in faults["cached"], faults["cached"]
    assert torch.equal(faults["cached"]["raw"], faults["declared"]["raw"])


def test_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the files is loaded as a repository is; what its model_index.json says is not said again."""
    case = ddit_cases(tmp_path)["org/mdlm"]
    for name, content in case.files.items():
        (tmp_path / name).write_bytes(content)
    mine = AncestralScheduler(vocab_size=V, mask_token_id=MASK, order="spread")
    pipe = DiscreteDiffusionPipeline.from_pretrained(
        tmp_path, tokenizer=tiny_tokenizer(), scheduler=mine, torch_dtype=torch.bfloat16, device_map="cpu"
    )
    assert pipe.scheduler is mine
    assert pipe.model.dtype == torch.bfloat16
    with torch.no_grad():
        logits = pipe.denoiser.raw(IDS, TIME)
    torch.testing.assert_close(logits.double(), case.expected, rtol=0.1, atol=0.2)
    half = {key: value.half() for key, value in load(case.files["model.safetensors"]).items()}
    (tmp_path / "model.safetensors").write_bytes(save(half))
    assert DiscreteDiffusionPipeline.from_pretrained(tmp_path, tokenizer=None).model.dtype == torch.float16
    pipe.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"`shift` is not for '.*saved', whose model_index.json says it"):
        DiscreteDiffusionPipeline.from_pretrained(tmp_path / "saved", shift=1)
