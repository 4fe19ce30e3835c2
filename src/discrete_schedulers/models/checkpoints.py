r"""What the Hub's discrete diffusion models are: one row a family, and how a row is found.

Their repositories have a config.json and weights, no model_index.json. What a sampler must know of them (the mask, the shift,
the process, the time input) stands partly there, partly in the tokenizer, partly nowhere: `FAMILIES` says where.
No code of a repository is ever run: each architecture is a network of this library or of transformers.

    DDiT          models/ddit.py
    causal        transformers' causal language model of `model_type` with `is_causal=False`: every position sees every other
    masked        transformers' masked language model of `model_type`
    canvas        transformers' `DiffusionGemmaForBlockDiffusion`, run by models/diffusion_gemma.py
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from discrete_schedulers.processes import NoiseSchedule

GPT2_TOKENIZER = "openai-community/gpt2"
DDIT_NAMES = {  # our config's names -> those of config.json, of the repositories with remote code
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_dim",
    "num_blocks": "n_blocks",
    "num_heads": "n_heads",
    "cond_dim": "cond_dim",
    "max_length": "model_length",
    "time_conditioning": "time_conditioning",
}
HYDRA_NAMES = {  # and of the repositories that hold the configuration of a training run
    "vocab_size": "tokens",
    "hidden_size": "model.hidden_size",
    "num_blocks": "model.n_blocks",
    "num_heads": "model.n_heads",
    "cond_dim": "model.cond_dim",
    "max_length": "model.length",
}
LLADA_NAMES = {
    "hidden_size": "d_model",
    "intermediate_size": "mlp_hidden_size",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "max_sequence_length",
    "vocab_size": "embedding_size",
    "tie_word_embeddings": "weight_tying",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "rms_norm_eps",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
LLADA_KEYS = (  # published key -> key of LlamaForCausalLM, as regular expressions, all applied in this order
    (r"^model\.transformer\.wte\.", "model.embed_tokens."),
    (r"^model\.transformer\.ln_f\.", "model.norm."),
    (r"^model\.transformer\.ff_out\.", "lm_head."),
    (r"^model\.transformer\.blocks\.", "model.layers."),
    (r"^(model\.layers\.\d+)\.attn_norm\.", r"\1.input_layernorm."),
    (r"^(model\.layers\.\d+)\.ff_norm\.", r"\1.post_attention_layernorm."),
    (r"^(model\.layers\.\d+)\.([qkv]_proj)\.", r"\1.self_attn.\2."),
    (r"^(model\.layers\.\d+)\.attn_out\.", r"\1.self_attn.o_proj."),
    (r"^(model\.layers\.\d+)\.ff_proj\.", r"\1.mlp.gate_proj."),
    (r"^(model\.layers\.\d+)\.up_proj\.", r"\1.mlp.up_proj."),
    (r"^(model\.layers\.\d+)\.ff_out\.", r"\1.mlp.down_proj."),
)
SEDD_UNIFORM_KEYS = (  # of its training; the repaired file has the later names
    (r"(^|\.)cond_map\.mlp\.", r"\1sigma_map.mlp."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.2."),
)
DIFFUGPT_KEYS = (
    (r"^embed_tokens\.", "transformer.wte."),
    (r"^denoise_model\.", "transformer."),
)
MASKED_KEYS = ((r"\.gamma$", ".weight"), (r"\.beta$", ".bias"))  # BERT's files are older than PyTorch's names
MASKED_IGNORED = (r"^cls\.seq_relationship\.", r"^\w+\.pooler\.", r"^esm\.contact_head\.", r"\.position_embeddings\.")


HEADS = {  # transformers' submodule that makes logits of hidden states, each position by itself, by model_type
    "llama": "lm_head",
    "qwen2": "lm_head",
    "qwen3": "lm_head",
    "gpt2": "lm_head",
    "esm": "lm_head",
    "roberta": "lm_head",
    "bert": "cls",
    "modernbert": "head",
}


class Family(NamedTuple):
    """One row.

    Args:
        name (`str`): What `from_pretrained(..., family=)` takes.
        architecture (`str`): `"DDiT"`, `"causal"`, `"masked"` or `"canvas"`, see above.
        mask (`int` or `str`, *optional*): The mask's id; `"last"`: the last state; `"config"`: `mask_token_id` in config.json;
            `"tokenizer"`: the tokenizer's; `None`: uniform process.
        repositories (`tuple[str, ...]`): Repository ids, `*` for any characters; case does not count.
        marks (`dict`): Values in config.json (dotted names), one of which must be there, for each name; an empty tuple: any.
        model_type (`str`, defaults to `""`): transformers' name of the architecture; empty: config.json's, without "a2d-".
        config_names (`dict`): Argument of the network's config -> dotted name in config.json; empty: the names are the same.
        config_values (`dict`): Arguments of the network's config that every checkpoint of the family has.
        keys (`tuple`): Pairs of a regular expression and its replacement, from the file's keys to the network's.
        ignored (`tuple[str, ...]`): Keys of the file that the network does not have, as regular expressions.
        extra_states (`int`, defaults to 0): States beyond the number of tokens in config.json.
        parametrization, shift, shift_first, noise_schedule: As in [`NetworkDenoiser`].
        block_size (`int` or `str`, *optional*): Positions of a block where the attention goes by blocks: a number, or its
            name in config.json. `None`: every position sees every other.
        suppress (`str` or `tuple[int, ...]`): Ids that are never drawn: these, or `"specials"`: the tokenizer's special tokens,
            or `"padding"`: ids that the tokenizer does not have.
        frozen (`tuple[int, ...]`): Ids that are never noised; with `suppress="specials"` these too.
        ends (`tuple[str, ...]`): Tokens by which texts end, beside the tokenizer's eos; empty: texts fill their length.
        tokenizer (`str`, defaults to `""`): Where the tokenizer is; empty: in the repository.
        tokenizer_class (`str`, defaults to `"AutoTokenizer"`): transformers' class for it.
    """

    name: str
    architecture: Literal["DDiT", "causal", "masked", "canvas"]
    mask: int | Literal["last", "config", "tokenizer"] | None
    repositories: tuple[str, ...]
    marks: Mapping[str, tuple] = {}
    model_type: str = ""
    config_names: Mapping[str, str] = {}
    config_values: Mapping[str, Any] = {}
    keys: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    extra_states: int = 0
    parametrization: Literal["x0", "score", "leave_one_out"] = "x0"
    shift: int = 0
    shift_first: Literal["keep", "copy"] = "keep"
    noise_schedule: NoiseSchedule = "linear"
    block_size: int | str | None = None
    suppress: Literal["specials", "padding"] | tuple[int, ...] = ()
    frozen: tuple[int, ...] = ()
    ends: tuple[str, ...] = ()
    tokenizer: str = ""
    tokenizer_class: str = "AutoTokenizer"


SDAR = Family(
    name="SDAR",
    architecture="causal",
    mask="config",
    repositories=("JetLM/SDAR-*", "Gen-Verse/TraDo-*"),
    marks={"model_type": ("sdar",)},
    model_type="qwen3",
    block_size="block_size",
    suppress="padding",
    tokenizer_class="Qwen2Tokenizer",
)

# SEDD's and RADD's files say less at masks than a score (SEDD's lacks -log(expm1(sigma)) and -log(V - 1), constants there)
# or a log-probability (RADD's is not normalised): the softmax over the tokens is the same.
# DUO and UDLM put the network's output in the place of x_0 in q(x_s | x_t, x_0), numerator and denominator: their posterior
# is the exact one where the output is the law of the token given all others, hence "leave_one_out".
FAMILIES = (
    Family(
        name="SEDD",
        architecture="DDiT",
        mask="last",
        repositories=("louaaron/sedd-*",),
        marks={"graph.type": ("absorb",), "model.type": ("ddit",), "noise.type": ("loglinear",)},
        config_names=HYDRA_NAMES,
        extra_states=1,
        parametrization="score",
        noise_schedule="loglinear",
        tokenizer=GPT2_TOKENIZER,
    ),
    Family(
        name="SEDD-uniform",
        architecture="DDiT",
        mask=None,
        repositories=("HuanranChen/SEDD-uniform-*",),
        marks={"graph.type": ("uniform", "simplex"), "noise.type": ("geometric",), "noise.sigma_max": (20,)},
        config_names=HYDRA_NAMES,
        keys=SEDD_UNIFORM_KEYS,
        parametrization="score",
        noise_schedule="geometric",
        tokenizer=GPT2_TOKENIZER,
    ),
    Family(
        name="RADD",
        architecture="DDiT",
        mask="last",
        repositories=("JingyangOu/radd-*",),
        marks={"model.type": ("ddit_wot",)},
        config_names={name: dotted for name, dotted in HYDRA_NAMES.items() if name != "cond_dim"},
        config_values={"cond_dim": None},
        extra_states=1,
        noise_schedule="loglinear",
        tokenizer=GPT2_TOKENIZER,
    ),
    Family(
        name="MDLM",
        architecture="DDiT",
        mask="last",
        repositories=("kuleshov-group/mdlm-*",),
        marks={"model_type": ("mdlm",)},
        config_names=DDIT_NAMES,
        noise_schedule="loglinear",
        tokenizer=GPT2_TOKENIZER,
    ),
    Family(
        name="SDTT",
        architecture="DDiT",
        mask="last",
        repositories=("jdeschena/sdtt",),  # the weights are on branches
        marks={"model.type": ("ddit-orig",)},
        config_names={name: dotted for name, dotted in HYDRA_NAMES.items() if name != "vocab_size"}
        | {"time_conditioning": "time_conditioning"},
        config_values={"vocab_size": 50258},  # gpt2's tokens and the mask; config.json names the tokenizer only
        noise_schedule="loglinear",
        tokenizer=GPT2_TOKENIZER,
    ),
    Family(
        name="DUO",
        architecture="DDiT",
        mask=None,
        repositories=("s-sahoo/duo*",),
        marks={"model_type": ("DUO",)},
        config_names={name: dotted for name, dotted in DDIT_NAMES.items() if name != "time_conditioning"},
        parametrization="leave_one_out",
        noise_schedule="loglinear",
        tokenizer=GPT2_TOKENIZER,
    ),
    Family(
        name="UDLM",
        architecture="DDiT",
        mask=None,
        repositories=("kuleshov-group/udlm-*",),
        marks={"model_type": ("udlm",)},
        config_names=DDIT_NAMES | {"num_classes": "cfg_num_classes"},
        parametrization="leave_one_out",
        noise_schedule="loglinear",
        tokenizer="google-bert/bert-base-uncased",
    ),
    Family(
        name="BD3-LM",
        architecture="DDiT",
        mask="last",
        repositories=("kuleshov-group/bd3lm-*",),
        marks={"model_type": ("bd3lm",)},
        config_names=DDIT_NAMES,
        noise_schedule="loglinear",
        block_size="block_size",
        tokenizer=GPT2_TOKENIZER,
    ),
    Family(
        name="LLaDA",
        architecture="causal",
        mask="config",
        repositories=("GSAI-ML/LLaDA-8B-*", "GSAI-ML/LLaDA-1.5"),
        marks={"model_type": ("llada",), "d_model": ()},  # LLaDA-MoE has the model_type, but `hidden_size`
        model_type="llama",
        config_names=LLADA_NAMES,
        keys=LLADA_KEYS,
        suppress="padding",
        ends=("<|endoftext|>", "<|eot_id|>"),
    ),
    Family(
        name="MMaDA",  # its text: codes of images are ids that the tokenizer does not have
        architecture="causal",
        mask=126336,
        repositories=("Gen-Verse/MMaDA-8B-*",),
        marks={"model_type": ("mmada",), "d_model": ()},
        model_type="llama",
        config_names=LLADA_NAMES | {"vocab_size": "new_vocab_size"},
        keys=LLADA_KEYS,
        suppress="padding",
    ),
    Family(
        name="Dream",
        architecture="causal",
        mask="config",
        repositories=("Dream-org/Dream-*", "apple/DiffuCoder-*"),
        marks={"model_type": ("Dream",)},
        model_type="qwen2",
        shift=1,
        suppress="padding",
        ends=("<|endoftext|>", "<|im_end|>"),
        tokenizer_class="Qwen2Tokenizer",
    ),
    Family(
        name="DiffuGPT-s",
        architecture="causal",
        mask=10541,
        repositories=("diffusionfamily/diffugpt-s",),
        model_type="gpt2",
        keys=DIFFUGPT_KEYS,
        shift=1,
        shift_first="copy",
    ),
    Family(
        name="DiffuGPT-m",
        architecture="causal",
        mask=50257,
        repositories=("diffusionfamily/diffugpt-m",),
        model_type="gpt2",
        keys=DIFFUGPT_KEYS,
        shift=1,
        shift_first="copy",
    ),
    Family(
        name="DiffuLLaMA",
        architecture="causal",
        mask=811,
        repositories=("diffusionfamily/diffullama",),
        model_type="llama",
        shift=1,
        shift_first="copy",
    ),
    Family(
        name="A2D",
        architecture="causal",
        mask="tokenizer",
        repositories=("dllm-hub/*-diffusion-mdlm-*", "dllm-collection/*-diffusion-mdlm-*"),
        marks={"model_type": ("a2d-qwen3", "a2d-qwen2", "a2d-llama")},
        suppress="padding",
        ends=("<|endoftext|>", "<|im_end|>", "<|eot_id|>"),
    ),
    Family(
        name="A2D-BD3LM",
        architecture="causal",
        mask="tokenizer",
        repositories=("dllm-hub/*-diffusion-bd3lm-*", "dllm-collection/*-diffusion-bd3lm-*"),
        block_size=32,  # of the training; config.json is that of A2D
        suppress="padding",
    ),
    Family(
        name="Fast-dLLM-v2",
        architecture="causal",
        mask=151665,
        repositories=("Efficient-Large-Model/Fast_dLLM_v2_*",),
        marks={"model_type": ("Fast_dLLM_Qwen",)},
        model_type="qwen2",
        shift=1,
        block_size="bd_size",
        suppress="padding",
        tokenizer_class="Qwen2Tokenizer",
    ),
    *(
        SDAR._replace(name=f"SDAR-b{size}", repositories=(f"JetLM/SDAR-*-b{size}",), marks={}, block_size=size)
        for size in (8, 16, 32, 64)
    ),
    SDAR,
    Family(
        name="DiffusionGemma",
        architecture="canvas",
        mask=None,
        repositories=("google/diffusiongemma-*",),
        marks={"model_type": ("diffusion_gemma",)},
        ends=("<turn|>",),
    ),
    Family(
        name="DPLM",
        architecture="masked",
        mask=32,
        repositories=("airkingbd/dplm_150m", "airkingbd/dplm_650m", "airkingbd/dplm_3b"),
        marks={"model_type": ("esm",), "dplm_type": ("dplm_esm",)},
        model_type="esm",
        ignored=MASKED_IGNORED,
        suppress=(0, 1, 2, 24),  # <cls>, <pad>, <eos>, X
        frozen=(0, 1, 2),
    ),
    Family(
        name="masked language model",
        architecture="masked",
        mask="tokenizer",
        repositories=(),
        marks={"model_type": ("bert", "roberta", "modernbert", "esm")},
        keys=MASKED_KEYS,
        ignored=MASKED_IGNORED,
        suppress="specials",
    ),
)

# Repositories that look like a family and are not of it: loaded as it they would sample, and badly.
OTHERS = {
    "Dream-org/DreamReasoner*": "its attention goes by blocks and its logits are not shifted, unlike Dream's",
    "JetLM/SDAR-30B-A3B*": "it is a mixture of experts",
    "airkingbd/dplm2*": "it has structure tokens beside residues",
    "tyfeld/MMaDA-Parallel-*": "it writes text and image side by side",
}
OTHER_TYPES = {  # model_type in config.json -> what there is for it
    "llada2_moe": "transformers has no class for it. Where its remote code runs, diffusers' LLaDA2Pipeline takes our "
    "schedulers as BlockRefinementAdapter(scheduler), see discrete_schedulers.interop",
}


def value_of(config: Mapping[str, Any], dotted: str) -> Any:
    """The value under a name such as `"model.hidden_size"`, `None` where there is none."""
    value: Any = config
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def find_family(name: str, config: Mapping[str, Any], family: str | None = None) -> Family:
    """The row of a repository: the one that is asked for, or that has its id, or whose marks are in its config.json.

    Args:
        name (`str`): Repository id or folder.
        config (`dict`): Its config.json.
        family (`str`, *optional*): Name of the row.

    Raises:
        ValueError: If there is no such row, or the repository is known not to fit the one it looks like.
    """
    names = ", ".join(repr(row.name) for row in FAMILIES)
    if family is not None:
        for row in FAMILIES:
            if row.name == family:
                return row
        raise ValueError(f"`family` is {family!r}; allowed: {names}")
    for pattern, reason in OTHERS.items():
        if fnmatch.fnmatch(name.lower(), pattern.lower()):
            raise ValueError(f"{name!r} is not supported: {reason}. To load it all the same, pass `family`")
    if config.get("model_type") in OTHER_TYPES:
        raise ValueError(f"{name!r} is not supported: {OTHER_TYPES[config['model_type']]}")
    for row in FAMILIES:
        if any(fnmatch.fnmatch(name.lower(), pattern.lower()) for pattern in row.repositories):
            return row
    for row in FAMILIES:
        present = {key: value_of(config, key) for key in row.marks}
        if row.marks and all(present[k] is not None and (present[k] in v or not v) for k, v in row.marks.items()):
            return row
    raise ValueError(
        f"{name!r} is of no known family: config.json has model_type {config.get('model_type')!r} and architectures "
        f"{config.get('architectures')!r}, and code of a repository is never run. Weights of a family load so: "
        f"from_pretrained({name!r}, family=..., mask_token_id=..., shift=...); families: {names}. For any other network build "
        "DiscreteDiffusionPipeline(model, scheduler, tokenizer, denoiser={...}) yourself"
    )


def network_arguments(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the network's config, from config.json.

    Raises:
        ValueError: If config.json lacks one.
    """
    if not family.config_names:
        ours = {
            "model_type",
            "architectures",
            "auto_map",
            "transformers_version",
            "dtype",
            "torch_dtype",
            "quantization_config",
            "attn_implementation",  # a file's wish for a kernel
        }
        return {name: value for name, value in config.items() if name not in ours} | dict(family.config_values)
    found = {name: value_of(config, dotted) for name, dotted in family.config_names.items()}
    if not config.get("cfg", True) or found.get("num_classes") is None:
        found.pop("num_classes", None)  # UDLM without guidance
    optional = {
        "max_length",
        "time_conditioning",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    }
    missing = [family.config_names[name] for name, value in found.items() if value is None and name not in optional]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}, which checkpoints of family {family.name!r} have")
    if family.extra_states:
        found["vocab_size"] += family.extra_states
    return {name: value for name, value in found.items() if value is not None} | dict(family.config_values)


def network_type(family: Family, config: Mapping[str, Any]) -> str:
    """transformers' name of the architecture."""
    return family.model_type or str(config.get("model_type")).removeprefix("a2d-")


def denoiser_facts(
    family: Family,
    config: Mapping[str, Any],
    vocab_size: int,
    tokenizer: Any = None,
    mask_token_id: int | None = None,
    shift: int | None = None,
    block_size: int | None = None,
) -> dict[str, Any]:
    """Arguments of [`NetworkDenoiser`] for a checkpoint, but for the network and what its class knows itself.

    Args:
        family (`Family`): Its row.
        config (`dict`): Its config.json.
        vocab_size (`int`): Width V of its logits.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Its tokenizer.
        mask_token_id (`int`, *optional*): Instead of the family's.
        shift (`int`, *optional*): Instead of the family's.
        block_size (`int`, *optional*): Instead of the family's.

    Raises:
        ValueError: If the mask is nowhere, or the family has none; if the size of blocks is nowhere.
    """
    if family.mask is None and mask_token_id is not None:
        raise ValueError(
            f"`mask_token_id` is {mask_token_id}, but family {family.name!r} has uniform noise and no mask"
        )
    mask = family.mask if mask_token_id is None else mask_token_id
    if mask == "last":
        mask = vocab_size - 1
    elif mask == "config":
        mask = config.get("mask_token_id")
    elif mask == "tokenizer":
        mask = None if tokenizer is None else tokenizer.mask_token_id
    if mask is None and family.mask is not None:
        raise ValueError(
            f"`mask_token_id` is required: family {family.name!r} has it in its {family.mask}, which does not name one"
        )
    if mask is not None and not 0 <= int(mask) < vocab_size:
        raise ValueError(f"`mask_token_id` is {mask}; allowed are 0 to {vocab_size - 1}, the states of this network")
    if block_size is None:
        block_size = value_of(config, family.block_size) if isinstance(family.block_size, str) else family.block_size
    if block_size is None and family.block_size is not None:
        raise ValueError(
            f"config.json lacks {family.block_size}, the size of the blocks of family {family.name!r}: pass "
            "denoiser={'block_size': ...}"
        )
    suppress, frozen = family.suppress, family.frozen
    if isinstance(suppress, str):
        specials = [] if tokenizer is None else tokenizer.all_special_ids
        padding = range(vocab_size if tokenizer is None else len(tokenizer), vocab_size)
        ids = specials if suppress == "specials" else padding
        suppress = tuple(sorted(i for i in ids if i != mask and i < vocab_size))
        frozen = suppress if family.suppress == "specials" else ()
    return {
        "vocab_size": vocab_size,
        "mask_token_id": mask,
        "process": "uniform" if family.mask is None else "absorbing",
        "parametrization": family.parametrization,
        "shift": family.shift if shift is None else shift,
        "shift_first": family.shift_first,
        "noise_schedule": family.noise_schedule,
        "attention": "full" if block_size is None else "block_causal",
        "block_size": block_size,
        "suppress_token_ids": list(suppress),
        "frozen_token_ids": list(frozen),
        "head": None if family.architecture == "DDiT" else HEADS.get(network_type(family, config)),
    }


def end_token_ids(family: Family, tokenizer: Any) -> list[int] | None:
    """Ids by which a family's texts end, of those that the tokenizer has; `None` where texts fill their length.

    Args:
        family (`Family`): Its row.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Its tokenizer.
    """
    if tokenizer is None or not family.ends:
        return None
    known = tokenizer.get_vocab()
    ids = {known[token] for token in family.ends if token in known} | {tokenizer.eos_token_id}
    return sorted(ids - {None}) or None
