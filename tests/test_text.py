"""What the text pipeline is asked for beside a prompt: chat, unequal prompts, guidance, logits processors, ends of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import LENGTH, MASK, WORDS, randomised, seeded, tiny_model, tiny_pipeline, tiny_tokenizer
from torch import Tensor, nn
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
)

from discrete_schedulers import (
    AncestralScheduler,
    ConfidenceScheduler,
    DiscreteDiffusionPipeline,
    EulerScheduler,
    HollowTransformerModel,
    NetworkDenoiser,
    RowLogits,
    guidance_schedule,
)
from discrete_schedulers.models.checkpoints import FAMILIES, end_token_ids
from discrete_schedulers.pipelines.text import ProcessedDenoiser, negative_ids, prefix_frame, template_frame

FACTS = {"vocab_size": len(WORDS), "mask_token_id": MASK}
UNIFORM = {"vocab_size": len(WORDS), "process": "uniform"}
PROMPTS = ["the old cat", "it", "a big red bird ran under"]
CLASSES = 3


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def greedy(block_length: int | None = None) -> ConfidenceScheduler:
    """No draw matters: the most probable tokens, the most certain first."""
    return ConfidenceScheduler(**FACTS, temperature=0, block_length=block_length)


# Networks of every shape that texts come from


def transformer(name: str) -> nn.Module:
    """A small network of transformers over `WORDS` that sees both ways."""
    small = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = small | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 40}
    bert = small | {"intermediate_size": 48, "max_position_embeddings": 40}
    configs: dict[str, tuple[str, dict]] = {
        "llama": ("LlamaForCausalLM", rope | {"is_causal": False, "use_cache": False}),
        "qwen2": ("Qwen2ForCausalLM", rope | {"is_causal": False, "use_cache": False}),
        "qwen3": ("Qwen3ForCausalLM", rope | {"is_causal": False, "use_cache": False, "head_dim": 8}),
        "gpt2": (
            "GPT2LMHeadModel",
            {"vocab_size": len(WORDS), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
            | {"is_causal": False, "use_cache": False},
        ),
        "bert": ("BertForMaskedLM", bert | {"pad_token_id": 0}),
        "roberta": ("RobertaForMaskedLM", bert | {"pad_token_id": 0}),
        "modernbert": (
            "ModernBertForMaskedLM",
            bert
            | {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
            | {"local_attention": 8},
        ),
        "esm": (
            "EsmForMaskedLM",
            bert
            | {"pad_token_id": 0, "mask_token_id": MASK, "token_dropout": True, "position_embedding_type": "rotary"},
        ),
    }
    cls, arguments = configs[name]
    network = getattr(transformers, cls)
    return randomised(network(network.config_class(**arguments)))


NETWORKS = ["ddit", "llama", "qwen2", "qwen3", "gpt2", "bert", "roberta", "modernbert", "esm"]


def text_pipeline(name: str, **facts: Any) -> DiscreteDiffusionPipeline:
    model = tiny_model() if name == "ddit" else transformer(name)
    return tiny_pipeline(greedy(), model=model, denoiser=facts)


# Prompts of unequal lengths


@pytest.mark.parametrize("name", NETWORKS)
def test_a_row_of_unequal_prompts_is_the_row_alone(name: str) -> None:
    pipe, arguments = text_pipeline(name), {"max_new_tokens": 7, "num_inference_steps": 4}
    together = pipe(PROMPTS, num_samples=2, **arguments)
    assert together.sequences.shape == (6, 6 + 7)
    for row, prompt in enumerate(PROMPTS):
        alone = pipe(prompt, **arguments)
        total = len(prompt.split()) + 7
        assert alone.sequences.shape == (1, total)
        for sample in (2 * row, 2 * row + 1):
            assert torch.equal(together.sequences[sample, :total], alone.sequences[0])
            assert (together.sequences[sample, total:] == 0).all()  # [PAD]
            assert together.texts[sample] == alone.texts[0]
    assert len({tuple(row[-14:]) for row in together.sequences.tolist()}) == 3


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("shift", [0, 1])
def test_logits_of_a_padded_row_are_those_of_the_row(name: str, shift: int) -> None:
    pipe = text_pipeline(name, shift=shift)
    frame = pipe.prepare_frame(PROMPTS, None, None, None, None, 5, None)
    denoiser = pipe.prepare_denoiser(frame, None, 1.0, None, None)
    x_t = frame.known.masked_fill(frame.known < 0, MASK)
    dense = denoiser(x_t, 0.5)
    rows = denoiser(x_t, 0.5, x_t == MASK)
    torch.testing.assert_close(rows.logits, dense[x_t == MASK], rtol=0, atol=1e-5)
    for row, prompt in enumerate(PROMPTS):
        total = len(prompt.split()) + 5
        alone = pipe.denoiser(x_t[row : row + 1, :total], 0.5)
        torch.testing.assert_close(dense[row : row + 1, :total], alone, rtol=0, atol=2e-5)
    hidden = pipe.denoiser(x_t, 0.5)  # without a mask the padding is seen
    assert (hidden[1, :6, :MASK] - dense[1, :6, :MASK]).abs().max() > 1e-3


@pytest.mark.parametrize("arguments", [{}, {"guidance_scale": 2.0}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("shift", [0, 1])
def test_unequal_prompts_where_attention_goes_by_blocks(arguments: dict, shift: int) -> None:
    facts = {"attention": "block_causal", "block_size": 4, "shift": shift}
    pipe = tiny_pipeline(greedy(4), model=transformer("qwen2"), denoiser=facts)
    arguments = arguments | {"max_new_tokens": 9, "num_inference_steps": 6}
    together = pipe(PROMPTS, **arguments)
    assert together.num_model_calls == (12 if "guidance_scale" in arguments else 6)
    for row, prompt in enumerate(PROMPTS):
        alone = pipe(prompt, **arguments).sequences[0]
        assert torch.equal(together.sequences[row, : len(alone)], alone)


@torch.no_grad()
def test_shadows_do_not_see_the_padding() -> None:
    pipe = text_pipeline("ddit", revealed_logits="shadow")
    frame = pipe.prepare_frame(PROMPTS, None, None, None, None, 5, None)
    x_t = frame.known.masked_fill(frame.known < 0, MASK)
    asked = x_t != 0
    logits = pipe.prepare_denoiser(frame, None, 1.0, None, None)(x_t, 0.5, asked).logits.split(asked.sum(1).tolist())
    for row, prompt in enumerate(PROMPTS):
        alone = x_t[row : row + 1, : len(prompt.split()) + 5]
        expected = pipe.denoiser(alone, 0.5, torch.ones_like(alone, dtype=torch.bool)).logits
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=2e-5)


def test_networks_without_attention_mask() -> None:
    model = HollowTransformerModel(len(WORDS), 32, 1, 1, 4, max_length=32)
    pipe = tiny_pipeline(model=randomised(model))
    with pytest.raises(
        ValueError, match=r"a HollowTransformerModel takes no `attention_mask` to hide it: pass `length`"
    ):
        pipe(PROMPTS, max_new_tokens=4)
    assert pipe(["the cat", "it was"], max_new_tokens=4, num_inference_steps=2).sequences.shape == (2, 6)
    assert pipe(max_new_tokens=4, num_inference_steps=2).sequences.shape == (1, 4)
    assert pipe(PROMPTS, length=9, num_inference_steps=2).sequences.shape == (3, 9)


# Start and end tokens


def test_masked_language_models_have_their_ends() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "then", "sep_token": "and"})
    start, end = ids("then and")
    facts = {"frozen_token_ids": [0, 1, start, end], "suppress_token_ids": [0, 1, start, end]}
    pipe = tiny_pipeline(model=transformer("bert"), tokenizer=tokenizer, denoiser=facts | {"max_length": 40})
    free = pipe(length=9, num_samples=3, num_inference_steps=3, generator=seeded())
    assert (free.sequences[:, [0, -1]] == torch.tensor([start, end])).all()
    assert not torch.isin(free.sequences[:, 1:-1], torch.tensor([0, 1, start, end, MASK])).any()
    assert pipe(num_inference_steps=1).sequences.shape == (1, 40)
    prompted = pipe(PROMPTS, max_new_tokens=4, num_inference_steps=3, generator=seeded())
    for row, prompt in zip(prompted.sequences.tolist(), PROMPTS, strict=True):
        total = len(prompt.split()) + 6
        assert row[:total][: len(prompt.split()) + 1] == [start, *ids(prompt)]
        assert (row[total - 1], row[total:]) == (end, [0] * (len(row) - total))
    assert all(text.startswith(prompt) for text, prompt in zip(prompted.texts, PROMPTS, strict=True))
    filled = pipe(template="the [MASK] cat", num_inference_steps=2, generator=seeded()).sequences[0].tolist()
    assert [filled[i] for i in (0, 1, 3, 4)] == [start, *ids("the cat"), end]
    again = pipe(template="then the [MASK] cat and", num_inference_steps=2, generator=seeded()).sequences[0].tolist()
    assert again == filled  # ends that the text has itself are not doubled
    as_ids = pipe(template=torch.tensor([[2, -1, 4]]), num_inference_steps=2).sequences
    assert as_ids.shape == (1, 3)
    with pytest.raises(
        ValueError, match="`prompt` has 0 tokens and 2 special ones; `length` 2 leaves nothing to write"
    ):
        pipe(length=2)


def test_token_dropout_sees_a_token_that_is_no_mask() -> None:
    """An ESM with token dropout divides by the share of tokens that are no masks: without ends that is NaN."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "then", "eos_token": "and"})
    model = transformer("esm")
    with torch.no_grad():
        assert not model(torch.full((1, 6), MASK)).logits.isfinite().all()
    pipe = tiny_pipeline(model=model, tokenizer=tokenizer, denoiser={"frozen_token_ids": ids("then and")})
    sequences = pipe(length=8, num_inference_steps=2, generator=seeded()).sequences
    assert (sequences[0, 0], sequences[0, -1]) == tuple(ids("then and"))


def test_models_without_frozen_tokens_have_no_ends() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "then", "sep_token": "and"})
    pipe = tiny_pipeline(tokenizer=tokenizer)
    known = pipe.prepare_frame("the cat", None, None, None, 5, None, None).known
    assert known.tolist() == [[*ids("the cat"), -1, -1, -1]]


# Chat


CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} and {% endfor %}{% if add_generation_prompt %}it{% endif %}"


def chat_pipeline(**changes: Any) -> DiscreteDiffusionPipeline:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    return tiny_pipeline(greedy(), tokenizer=tokenizer, **changes)


def test_messages() -> None:
    pipe, arguments = chat_pipeline(), {"max_new_tokens": 5, "num_inference_steps": 3}
    one = [{"role": "cat", "content": "the old dog ran"}]
    two = [{"role": "bird", "content": "a tree"}, {"role": "dog", "content": "was"}]
    output = pipe(messages=[one, two], **arguments)
    prompts = ["cat the old dog ran and it", "bird a tree and dog was and it"]
    for row, prompt in zip(output.sequences.tolist(), prompts, strict=True):
        assert row[: len(prompt.split())] == ids(prompt)
    whole = pipe(prompts, **arguments)
    assert torch.equal(output.sequences, whole.sequences)
    for reply, text, prompt in zip(output.texts, whole.texts, prompts, strict=True):
        assert text == f"{prompt} {reply}"  # the reply alone
    assert pipe(messages=one, **arguments).texts == output.texts[:1]


def test_messages_that_cannot_be_read() -> None:
    pipe = chat_pipeline()
    for messages in ([], [[]], "hello", ["hello"], [[{"role": "cat"}], ["hello"]]):
        with pytest.raises(ValueError, match="`messages` must be a list of dictionaries such as"):
            pipe(messages=messages, max_new_tokens=2)
    for without in (tiny_pipeline(), tiny_pipeline(tokenizer=None)):
        with pytest.raises(ValueError, match="`messages` need a tokenizer with a chat template"):
            without(messages=[{"role": "cat", "content": "it"}], max_new_tokens=2)
    with pytest.raises(ValueError, match="`prompt` and `messages` cannot both be given"):
        pipe("it", messages=[{"role": "cat", "content": "it"}])


# Ends of texts


def test_texts_end_at_the_first_end_token_that_was_written(tmp_path: Path) -> None:
    cat, mat = ids("cat mat")

    def write(pipe: Any, step: int, t: Tensor, kwargs: dict) -> dict:
        written = torch.tensor([ids("the cat sat on mat big cat a"), ids("mat dog a red bird ran it was")])
        return {"latents": torch.where(kwargs["latents"] >= 0, written, 0)}

    pipe = tiny_pipeline(eos_token_id=[cat, mat])
    arguments = {"num_inference_steps": 1, "num_samples": 2, "length": 8, "callback_on_step_end": write}
    assert pipe(**arguments).texts == ["the", ""]
    assert pipe(**arguments, eos_token_id=mat).texts == ["the cat sat on", ""]
    assert pipe(**arguments, eos_token_id=[]).texts[0] == "the cat sat on mat big cat a"
    assert pipe("the cat", **arguments).texts[0] == "the cat sat on"  # a prompt's own do not count
    assert pipe(template="the cat" + " [MASK]" * 6, **arguments | {"length": None}).texts[0].endswith("cat a")
    assert torch.equal(pipe(**arguments).sequences[0], torch.tensor(ids("the cat sat on mat big cat a")))
    plain = tiny_pipeline()
    assert plain(**arguments).texts[0] == "the cat sat on mat big cat a"
    pipe.save_pretrained(tmp_path)
    loaded = DiscreteDiffusionPipeline.from_pretrained(tmp_path)
    assert loaded.config.eos_token_id == [cat, mat]
    assert loaded(**arguments).texts == ["the", ""]


def test_families_that_end_their_texts() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|eot_id|>", "<|im_end|>"], special_tokens=True)
    tokenizer.eos_token = "and"
    expected = {
        "LLaDA": ["and", "<|eot_id|>"],
        "DiffusionGemma": ["and"],
        "Dream": ["and", "<|im_end|>"],
        "A2D": ["and", "<|eot_id|>", "<|im_end|>"],
    }
    for family in FAMILIES:
        found = end_token_ids(family, tokenizer)
        names = None if found is None else tokenizer.convert_ids_to_tokens(found)
        assert names == expected.get(family.name), family.name
        assert end_token_ids(family, None) is None
    assert end_token_ids(FAMILIES[0], tiny_tokenizer()) is None


# Guidance


def by_hand(
    pipe: DiscreteDiffusionPipeline, x: Tensor, unconditional: Tensor, scale: Any, generator: Any, **labels: Tensor
) -> Tensor:
    """Samples of the loop with dense, guided logits, both branches written out."""
    scheduler, known = pipe.scheduler, x.clone()
    scheduler.set_timesteps(4)
    start = scheduler.sample_prior(tuple(x.shape), generator)
    x = torch.where(known >= 0, known, start)
    for t in scheduler.timesteps:
        sigma = -torch.log(1 - (1 - 1e-3) * t).float().expand(len(x))
        seen = torch.where(unconditional >= 0, unconditional, x)
        positive = {} if not labels else {"class_labels": labels["labels"]}
        negative = {} if not labels else {"class_labels": torch.full_like(labels["labels"], CLASSES)}
        with torch.no_grad():
            c, u = pipe.model(x, sigma, **positive).logits, pipe.model(seen, sigma, **negative).logits
        s = scale(float(t)) if callable(scale) else scale
        x = scheduler.step(u + s * (c - u), t, x, generator=generator).prev_sample
        x = torch.where(known >= 0, known, x)
    return x


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
@pytest.mark.parametrize("scale", [2.5, lambda t: 1 + 3 * (1 - t)], ids=["constant", "schedule"])
def test_class_guidance(process: str, scale: Any) -> None:
    scheduler = AncestralScheduler(**(FACTS if process == "absorbing" else UNIFORM))
    pipe, seen = tiny_pipeline(scheduler, model=tiny_model(num_classes=CLASSES)), []
    pipe.model.register_forward_pre_hook(
        lambda module, inputs, kwargs: seen.append(kwargs["class_labels"]), with_kwargs=True
    )
    arguments = {"length": 8, "num_inference_steps": 4}
    output = pipe(class_labels=[0, 2], num_samples=2, guidance_scale=scale, generator=seeded(3), **arguments)
    labels = torch.tensor([0, 0, 2, 2])
    assert torch.equal(seen[-1], torch.cat([labels, torch.full((4,), CLASSES)]))
    steps = len(seen)
    assert output.num_model_calls == 2 * steps - (callable(scale))  # at t = 1 the schedule is off
    known = torch.full((4, 8), -1)
    expected = by_hand(pipe, known, known, scale, seeded(3), labels=labels)
    assert torch.equal(output.sequences, expected)
    plain = pipe(class_labels=[0, 2], num_samples=2, generator=seeded(3), **arguments)
    assert plain.num_model_calls == 4
    assert not torch.equal(plain.sequences, output.sequences)
    assert torch.equal(plain.sequences, by_hand(pipe, known, known, 1.0, seeded(3), labels=labels))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_schedule_is_its_function(schedule: str) -> None:
    """By its name, as image pipelines take it, and as a function of time: the same scales, samples and calls."""
    pipe = tiny_pipeline(model=tiny_model(num_classes=CLASSES))
    arguments = {"class_labels": [0, 2], "length": 8, "num_inference_steps": 4}
    named = pipe(**arguments, guidance_scale=3.0, guidance_schedule=schedule, generator=seeded(3))
    function = pipe(**arguments, guidance_scale=guidance_schedule(schedule, 3.0), generator=seeded(3))
    assert torch.equal(named.sequences, function.sequences)
    assert named.num_model_calls == function.num_model_calls == 8 - (schedule != "constant")  # at t = 1 the scale is 1


def test_a_callback_changes_the_guidance() -> None:
    """As diffusers' own `SDXLCFGCutoffCallback` does it: off after two of four steps, as a schedule would have it."""

    def cut_off(pipe: Any, step: int, t: Tensor, kwargs: dict) -> dict:
        scales.append(pipe.guidance_scale)
        if step == 1:
            pipe._guidance_scale = 1.0
        return {}

    pipe, scales = tiny_pipeline(model=tiny_model(num_classes=CLASSES)), []
    arguments = {"class_labels": [0, 2], "length": 8, "num_inference_steps": 4}
    output = pipe(**arguments, guidance_scale=3.0, generator=seeded(3), callback_on_step_end=cut_off)
    schedule = pipe(**arguments, guidance_scale=lambda t: 3.0 if t > 0.6 else 1.0, generator=seeded(3))
    assert torch.equal(output.sequences, schedule.sequences)
    assert output.num_model_calls == schedule.num_model_calls == 6
    assert scales == [3.0, 3.0, 1.0, 1.0]
    whole = pipe(**arguments, guidance_scale=3.0, generator=seeded(3))
    assert not torch.equal(whole.sequences, output.sequences)
    assert pipe.guidance_scale == 3.0


def test_class_labels() -> None:
    pipe, seen = tiny_pipeline(model=tiny_model(num_classes=CLASSES)), []
    pipe.model.register_forward_pre_hook(
        lambda module, inputs, kwargs: seen.append(torch.as_tensor(kwargs["class_labels"]).tolist()), with_kwargs=True
    )
    arguments = {"length": 6, "num_inference_steps": 1}
    pipe(num_samples=2, **arguments)  # any class
    pipe(class_labels=1, num_samples=2, **arguments)
    pipe(["the", "it"], class_labels=torch.tensor([1, 0]), num_samples=2, **arguments)
    pipe(["the", "it"], class_labels=2, **arguments)
    pipe("the", guidance_scale=2.0, **arguments)  # by the prompt
    assert seen == [[3, 3], [1, 1], [1, 1, 0, 0], [2, 2], [3, 3]]
    fixed = tiny_pipeline(model=pipe.model, denoiser={"call_arguments": {"class_labels": [1]}})
    fixed(num_samples=2, **arguments)
    fixed(class_labels=2, num_samples=2, **arguments)  # the call wins
    assert seen[5:] == [[1], [2, 2]]


@pytest.mark.parametrize("form", ["masked", "negative", "template"])
def test_guidance_by_what_is_known(form: str) -> None:
    """LLaDA's: the unconditional branch has masks, or a negative prompt, in the place of the prompt."""
    pipe, prompts = tiny_pipeline(), ["the old cat", "it"]
    known = torch.full((2, 8), -1)
    known[0, :3], known[1, :1] = torch.tensor(ids("the old cat")), torch.tensor(ids("it"))
    unconditional = torch.where(known >= 0, MASK, -1)
    arguments: dict[str, Any] = {"prompt": prompts, "length": 8}
    if form == "negative":
        arguments["negative_prompt"] = ["a dog", ""]
        unconditional[0, :2] = torch.tensor(ids("a dog"))
    if form == "template":
        known[0, 6] = unconditional[1, 7] = -1
        known[0, 6], known[1, 7] = ids("mat dog")
        unconditional = torch.where(known >= 0, MASK, -1)
        arguments = {"template": known.clone()}
    output = pipe(guidance_scale=3.0, num_inference_steps=4, generator=seeded(2), **arguments)
    assert torch.equal(output.sequences, by_hand(pipe, known, unconditional, 3.0, seeded(2)))
    assert output.num_model_calls == 8
    plain = pipe(num_inference_steps=4, generator=seeded(2), **arguments | {"negative_prompt": None})
    assert not torch.equal(plain.sequences, output.sequences)


def test_guidance_with_padding_and_ends() -> None:
    """A guided row of unequal prompts is the guided row alone; start and end are seen by both branches."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "then", "sep_token": "and"})
    facts = {"frozen_token_ids": ids("then and")}
    pipe = tiny_pipeline(greedy(), model=transformer("bert"), tokenizer=tokenizer, denoiser=facts)
    arguments = {"max_new_tokens": 5, "num_inference_steps": 3, "guidance_scale": 2.0}
    seen = []
    pipe.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    together = pipe(PROMPTS, negative_prompt="dog", **arguments).sequences
    masked, sheet = seen[0][3:], seen[0][:3]
    for row, prompt in enumerate(PROMPTS):
        end = len(prompt.split()) + 1
        assert masked[row, :end].tolist() == [*ids("then dog"), *[MASK] * (end - 2)]
        assert torch.equal(masked[row, end:], sheet[row, end:])
        alone = pipe(prompt, negative_prompt="dog", **arguments).sequences[0]
        assert torch.equal(together[row, : len(alone)], alone)


def test_what_the_unconditional_branch_sees() -> None:
    """By hand: kept ids and padding stay, a place to be written is not covered, the rest of a prompt's place is masks."""
    frame = prefix_frame([[5, -1, 7], [8]], None, 2, ends=([2], [3]), padding=0)
    assert frame.known.tolist() == [[2, 5, -1, 7, -1, -1, 3], [2, 8, -1, -1, 3, 0, 0]]
    masked = negative_ids(frame, None, MASK, kept=[2, 3])
    assert masked.tolist() == [[-1, MASK, -1, MASK, -1, -1, -1], [-1, MASK, -1, -1, -1, -1, -1]]
    others = negative_ids(frame, [[10, 11], [12]], MASK, kept=[2, 3])
    assert others.tolist() == [[-1, 10, -1, MASK, -1, -1, -1], [-1, 12, -1, -1, -1, -1, -1]]
    template = template_frame(torch.tensor([[2, 5, -1, 6, 3]]))
    assert negative_ids(template, None, MASK, kept=[2, 3]).tolist() == [[-1, MASK, -1, MASK, -1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": 2.0}, "`guidance_scale` needs something to be guided by"),
        ({"prompt": "it", "negative_prompt": "a"}, "`negative_prompt` is for guidance: pass `guidance_scale`"),
        (
            {"prompt": "it", "negative_prompt": "a dog", "guidance_scale": 2.0},
            "a `negative_prompt` has 2 tokens, its prompt 1",
        ),
        (
            {"prompt": ["it", "a", "the"], "negative_prompt": ["a", "a"], "guidance_scale": 2.0, "num_samples": 2},
            "`negative_prompt` has 2 texts; it must have one, or one for each prompt, here 3",
        ),
        ({"class_labels": 1}, "`class_labels` were passed, but this model has no classes"),
        ({"max_new_tokens": 4, "length": 5}, "`length` and `max_new_tokens` cannot both be given"),
        ({"max_new_tokens": 4, "template": "the [MASK]"}, "`max_new_tokens` and `template` cannot both be given"),
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0; allowed are 1 to 32"),
        ({"max_new_tokens": 31, "prompt": "the cat"}, "the samples would have 33 tokens; this model takes at most 32"),
        (
            {"logits_processor": [TemperatureLogitsWarper(0.5)]},
            "`logits_processor` is a list; it must be a processor or",
        ),
        ({"guidance_scale": float("inf"), "prompt": "it"}, "`guidance_scale` is inf"),
        ({"guidance_scale": "2", "prompt": "it"}, "`guidance_scale` is '2'; it must be a finite number"),
        ({"prompt": []}, r"`prompt` is \[\]; it must be a text or a list of texts, at least one"),
        ({"prompt": ["it", 3]}, "`prompt` is .* it must be a text or a list of texts"),
        ({"eos_token_id": "[PAD]"}, r"`eos_token_id` is '\[PAD\]'; it must be an id or a list of ids"),
    ],
)
def test_arguments_that_are_not_allowed(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_pipeline()(**arguments)


def test_arguments_that_a_process_or_model_does_not_have() -> None:
    uniform = tiny_pipeline(AncestralScheduler(**UNIFORM))
    arguments = {"guidance_scale": 2.0, "length": 6, "num_inference_steps": 2}
    with pytest.raises(
        ValueError, match=r"0 tokens, its prompt 2: a uniform process has no mask .* guide by `class_labels`"
    ):
        uniform("the cat", **arguments)
    assert uniform("the cat", negative_prompt="a dog", **arguments).num_model_calls == 4
    classes = tiny_pipeline(model=tiny_model(num_classes=CLASSES))
    with pytest.raises(ValueError, match=r"`class_labels` is \[0, 4\]; allowed are 0 to 3, the last one for any"):
        classes(class_labels=[0, 4])
    with pytest.raises(ValueError, match=r"`class_labels` has 2 entries; .* here 3"):
        classes(PROMPTS, class_labels=[0, 1], num_samples=2, length=9)


# Logits processors


class Notes(LogitsProcessor):
    """Writes down what it sees, and adds the number of tokens before to the last column but one."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append((input_ids.clone(), scores.clone()))
        scores[:, MASK - 1] += input_ids.shape[1]
        return scores


def test_what_a_processor_sees() -> None:
    x_t = torch.randint(0, len(WORDS), (3, 5), generator=seeded(1))
    raw = torch.randn(3, 5, len(WORDS), generator=seeded(2)).bfloat16()

    def network(x: Tensor) -> Tensor:
        return torch.stack([raw[next(i for i in range(3) if torch.equal(x_t[i], row))] for row in x])

    class Table(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return network(x)

    inner, notes = NetworkDenoiser(Table(), **FACTS, suppress_token_ids=(1,)), Notes()
    processed = ProcessedDenoiser(inner, notes)
    plain = inner(x_t, 0.5)
    dense = processed(x_t, 0.5)
    assert len(notes.seen) == 5
    for i, (before, scores) in enumerate(notes.seen):
        assert torch.equal(before, x_t[:, :i])
        assert scores.dtype == torch.float32
        assert torch.equal(scores, plain[:, i].float())
        assert (scores[:, [1, MASK]] == float("-inf")).all()
        assert torch.equal(dense[:, i, MASK - 1], plain[:, i, MASK - 1].float() + i)
    notes.seen.clear()
    positions = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]]).bool()
    rows = processed(x_t, 0.5, positions)
    assert isinstance(rows, RowLogits)
    assert torch.equal(rows.logits, dense[positions])
    assert [before.tolist() for before, _ in notes.seen] == [
        [[]],
        x_t[[0, 2], :1].tolist(),
        x_t[:1, :4].tolist(),
    ]
    assert processed(x_t, 0.5, torch.zeros_like(positions)).logits.shape == (0, len(WORDS))
    assert (processed.vocab_size, processed.mask_token_id, processed.calls_at(0.5)) == (len(WORDS), MASK, 1)


@pytest.mark.parametrize("name", ["rows", "dense", "uniform"])
def test_temperature_warper_is_the_schedulers_temperature(name: str) -> None:
    kind, facts = {
        "rows": (AncestralScheduler, FACTS),
        "dense": (EulerScheduler, FACTS),
        "uniform": (AncestralScheduler, UNIFORM | {"tempered": "denoiser"}),
    }[name]
    arguments = {"num_samples": 4, "length": LENGTH, "num_inference_steps": 5}
    tempered = tiny_pipeline(kind(**facts, temperature=0.5))(**arguments, generator=seeded()).sequences
    pipe = tiny_pipeline(kind(**facts))
    warper = LogitsProcessorList([TemperatureLogitsWarper(0.5)])
    assert torch.equal(pipe(**arguments, generator=seeded(), logits_processor=warper).sequences, tempered)
    assert not torch.equal(pipe(**arguments, generator=seeded()).sequences, tempered)


def test_tokens_that_are_suppressed_are_never_drawn() -> None:
    pipe, arguments = tiny_pipeline(), {"num_samples": 30, "length": LENGTH, "num_inference_steps": 4}
    common = pipe(**arguments, generator=seeded()).sequences.flatten().bincount().argsort(descending=True)[:6].tolist()
    suppress = SuppressTokensLogitsProcessor(common, device="cpu")
    drawn = pipe(**arguments, generator=seeded(), logits_processor=suppress).sequences
    assert not torch.isin(drawn, torch.tensor(common)).any()


def test_processors_that_read_the_tokens_before() -> None:
    """Left to right, one token at a time, they do what they do in `generate`."""
    pipe = tiny_pipeline(ConfidenceScheduler(**FACTS, block_length=1))
    arguments = {"num_samples": 40, "length": LENGTH, "num_inference_steps": LENGTH}

    def pairs(rows: Tensor) -> Tensor:
        return rows[:, :-1] * len(WORDS) + rows[:, 1:]

    plain = pipe(**arguments, generator=seeded()).sequences
    numbers, counts = pairs(plain).unique(return_counts=True)
    worst = numbers[counts.argsort(descending=True)[:5]]
    bad = [[int(pair) // len(WORDS), int(pair) % len(WORDS)] for pair in worst]
    assert torch.isin(pairs(plain), worst).sum() > 20
    words = NoBadWordsLogitsProcessor(bad, eos_token_id=0)
    rows = pipe(**arguments, generator=seeded(), logits_processor=LogitsProcessorList([words])).sequences
    assert not torch.isin(pairs(rows)[:, 1:], worst).any()
    for i in range(LENGTH):  # the first pair too, where a version's processor looks at it: older ones let it pass
        scores = words(rows[:, :i], torch.zeros(len(rows), len(WORDS)))
        assert scores.gather(1, rows[:, i, None]).isfinite().all()
    end = int(plain[:, :6].flatten().bincount().argmax())
    rows = pipe(**arguments, generator=seeded(), logits_processor=MinLengthLogitsProcessor(6, end)).sequences
    assert (rows[:, :6] != end).all()
    assert (rows[:, 6:] == end).any()
    once = NoRepeatNGramLogitsProcessor(1)
    rows = pipe(**arguments, generator=seeded(), logits_processor=once).sequences
    assert all(len(row.unique()) == LENGTH for row in rows)


def test_processors_come_after_guidance() -> None:
    pipe, notes = tiny_pipeline(model=tiny_model(num_classes=CLASSES)), Notes()
    arguments = {"class_labels": 1, "guidance_scale": 4.0, "length": 4, "num_inference_steps": 1}
    output = pipe(**arguments, logits_processor=notes, generator=seeded())
    sheet, sigma = torch.full((1, 4), MASK), torch.tensor([6.907755])
    with torch.no_grad():
        c, u = (pipe.model(sheet, sigma, torch.tensor([label])).logits for label in (1, CLASSES))
    expected = (u + 4 * (c - u))[0, :, :MASK]
    torch.testing.assert_close(torch.cat([scores for _, scores in notes.seen])[:, :MASK], expected, rtol=0, atol=1e-4)
    assert output.num_model_calls == 2
