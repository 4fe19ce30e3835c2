"""Metric functions against cases worked by hand, definitions written out in plain loops, and transformers' own loss."""

from __future__ import annotations

import dataclasses
import itertools
import lzma
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from laws import exact_denoiser, random_joint

import discrete_schedulers
from discrete_schedulers import AncestralScheduler, LSDScheduler
from discrete_schedulers.evaluation import (
    CausalLMJudge,
    NgramJudge,
    distinct_n,
    frechet_distance,
    generative_perplexity,
    js_divergence,
    kl_divergence,
    mean_and_error,
    perplexity,
    repetition,
    sampler_nll_bound,
    self_bleu,
    total_variation,
    unigram_entropy,
)

CORPUS = Path(discrete_schedulers.__file__).parent / "assets" / "tiny-text" / "corpus"


def law(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64)


class TestSequences:
    def test_unigram_entropy_by_hand(self):
        # Shares (1/2, 1/4, 1/4): 1.5 bits. One token: 0. All different: log 4. The ids themselves do not matter.
        sequences = torch.tensor([[7, 7, 50256, 0], [3, 3, 3, 3], [-1, 5, 6, 9]])
        entropy = unigram_entropy(sequences)
        assert entropy.dtype == torch.float64
        expected = law(1.5 * math.log(2), 0.0, 2 * math.log(2))
        torch.testing.assert_close(entropy, expected, rtol=0, atol=1e-15)

    def test_unigram_entropy_of_a_batch_is_that_of_its_rows(self):
        sequences = torch.randint(0, 5, (4, 30), generator=torch.Generator().manual_seed(0))
        rows = torch.cat([unigram_entropy(row[None]) for row in sequences])
        assert torch.equal(unigram_entropy(sequences), rows)

    def test_distinct_n_by_hand(self):
        # Bigrams: 12 21 12 | 21 12 23: {12, 21, 23} of 6. Unigrams {1, 2, 3} of 8. 4-grams: both different.
        sequences = torch.tensor([[1, 2, 1, 2], [2, 1, 2, 3]])
        assert distinct_n(sequences, 1) == 3 / 8
        assert distinct_n(sequences, 2) == 3 / 6
        assert distinct_n(sequences, 4) == 1.0

    def test_repetition_by_hand(self):
        # Row 1, bigrams 12 21 12 21: two of four seen before. Row 2: 12 24 45 53: none, the 12 of row 1 does not count.
        sequences = torch.tensor([[1, 2, 1, 2, 1], [1, 2, 4, 5, 3]])
        assert repetition(sequences, n=2) == (2 / 4 + 0) / 2
        assert repetition(torch.tensor([[1, 2], [1, 2]]), n=1) == 0.0
        # The default is n = 4: 1111 three times in six ones.
        assert repetition(torch.ones(1, 6, dtype=torch.int64)) == 2 / 3

    def test_ngram_shares_match_plain_loops(self):
        sequences = torch.randint(0, 3, (5, 17), generator=torch.Generator().manual_seed(1))
        for n in (1, 2, 3):
            grams = [[tuple(row[i : i + n]) for i in range(17 - n + 1)] for row in sequences.tolist()]
            every = [gram for row in grams for gram in row]
            assert distinct_n(sequences, n) == pytest.approx(len(set(every)) / len(every), abs=1e-15)
            seen_before = [sum(gram in row[:i] for i, gram in enumerate(row)) / len(row) for row in grams]
            assert repetition(sequences, n) == pytest.approx(sum(seen_before) / len(seen_before), abs=1e-15)

    @pytest.mark.parametrize("n", [0, 4])
    def test_n_out_of_range(self, n):
        sequences = torch.tensor([[1, 2, 3]])
        with pytest.raises(ValueError, match=f"n must lie between 1 and the sequence length 3, got {n}"):
            distinct_n(sequences, n)
        with pytest.raises(ValueError, match="n must lie"):
            repetition(sequences, n)

    @pytest.mark.parametrize("sequences", [torch.tensor([1, 2]), torch.ones(1, 4), torch.ones(0, 4).long()])
    def test_wrong_sequences(self, sequences):
        for metric in (unigram_entropy, lambda x: distinct_n(x, 1), lambda x: repetition(x, 1)):
            with pytest.raises(ValueError, match="sequences must be non-empty integers of shape"):
                metric(sequences)


class TestSelfBleu:
    def test_by_hand(self):
        pytest.importorskip("sacrebleu")
        # n-gram precisions 4/5, 3/4, 2/3, 1/2 in both directions; equal lengths, so no brevity penalty.
        expected = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
        assert self_bleu(["a b c d e", "a b c d f"]) == pytest.approx(expected, rel=1e-12)

    def test_mean_over_texts_against_all_others(self):
        pytest.importorskip("sacrebleu")
        # Both copies find themselves among the references (100); the third text shares nothing (0).
        texts = ["a b c d e", "a b c d e", "v w x y z"]
        assert self_bleu(texts) == pytest.approx(200 / 3, rel=1e-12)
        assert self_bleu(texts, max_texts=2) == pytest.approx(100, rel=1e-12)

    def test_tokenize_is_used(self):
        pytest.importorskip("sacrebleu")
        assert self_bleu(["abcdefgh", "abcdefgx"], tokenize="none") == 0
        assert self_bleu(["abcdefgh", "abcdefgx"], tokenize="char") > 50

    def test_errors(self):
        pytest.importorskip("sacrebleu")
        with pytest.raises(ValueError, match="at least 2 texts, got 1"):
            self_bleu(["a"])
        with pytest.raises(ValueError, match=r"max_texts must be None or at least 2 .* got 1"):
            self_bleu(["a", "b"], max_texts=1)
        with pytest.raises(ValueError, match="got one str"):
            self_bleu("ab")

    def test_missing_sacrebleu_says_what_to_do(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sacrebleu", None)
        with pytest.raises(ImportError, match="pip install sacrebleu"):
            self_bleu(["a", "b"])


class TestLaws:
    def test_by_hand(self):
        p, q = law(0.5, 0.5, 0.0), law(0.25, 0.5, 0.25)
        assert total_variation(p, q).item() == 0.25
        assert kl_divergence(p, q).item() == pytest.approx(0.5 * math.log(2), abs=1e-15)
        # m = (3/8, 1/2, 1/8)
        expected = (0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * math.log(2)) / 2
        assert js_divergence(p, q).item() == pytest.approx(expected, abs=1e-15)
        assert js_divergence(q, p).item() == pytest.approx(expected, abs=1e-15)

    def test_zeros(self):
        p, q = law(0.5, 0.5, 0.0), law(0.25, 0.5, 0.25)
        assert kl_divergence(q, p).item() == math.inf
        disjoint = law(0.0, 0.0, 1.0)
        assert total_variation(p, disjoint).item() == 1.0
        assert js_divergence(p, disjoint).item() == pytest.approx(math.log(2), abs=1e-15)

    @pytest.mark.parametrize("distance", [total_variation, kl_divergence, js_divergence])
    def test_equal_laws_are_at_distance_zero_in_any_shape(self, distance):
        joint = torch.rand(3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        joint[0] = 0
        joint = joint / joint.sum()
        assert distance(joint, joint).item() == 0.0
        assert distance(joint, joint.flip(1)).item() > 0.01

    def test_gradient_flows(self):
        # d/dz KL(p || softmax z) = softmax z - p.
        z, p = torch.tensor([0.1, -0.3, 0.7], dtype=torch.float64, requires_grad=True), law(0.2, 0.3, 0.5)
        q = z.softmax(0)
        kl_divergence(p, q).backward()
        torch.testing.assert_close(z.grad, (q - p).detach(), rtol=0, atol=1e-14)

    @pytest.mark.parametrize("distance", [total_variation, kl_divergence, js_divergence])
    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            (torch.tensor([0.5, 0.5]), "q must be float64"),
            (law(1.5, -0.5), "q must not be negative"),
            (law(math.nan, 1.0), "q must not be negative or NaN"),
            (law(0.5, 0.5 + 1e-8), "q must sum to 1"),
            (law(0.5, 0.25, 0.25), "same shape"),
        ],
    )
    def test_errors(self, distance, bad, message):
        with pytest.raises(ValueError, match=message):
            distance(law(0.5, 0.5), bad)
        with pytest.raises(ValueError, match=message.replace("q must", "p must")):
            distance(bad, law(0.5, 0.5))


class TestFrechetDistance:
    def test_one_dimension_by_hand(self):
        # means 2 and 5, standard deviations 2 and 1 (over n - 1): 3^2 + 1^2
        x = torch.tensor([[0.0], [2.0], [4.0]])
        y = torch.tensor([[4.0], [5.0], [6.0]])
        assert frechet_distance(x, y) == pytest.approx(10.0, abs=1e-12)

    def test_two_dimensions_by_hand(self):
        # S_x = diag(2, 8), S_y = [[4, 4], [4, 4]]: they do not commute. tr (S_x S_y)^1/2 = sqrt(tr + 2 sqrt(det)) = sqrt(40),
        # since S_x S_y = [[8, 8], [32, 32]] has determinant 0; means (0, 0) and (1, -2)
        x = torch.tensor([[1.0, 2.0], [1.0, -2.0], [-1.0, 2.0], [-1.0, -2.0]]) * math.sqrt(1.5)
        y = torch.tensor([[3.0, 0.0], [1.0, -2.0], [-1.0, -4.0]])
        assert frechet_distance(x, y) == pytest.approx(1 + 4 + 10 + 8 - 2 * math.sqrt(40), abs=1e-6)
        assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y), abs=1e-6)

    def test_full_rank_against_the_square_root_of_scipy(self):
        linalg = pytest.importorskip("scipy.linalg")
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(60, 5, generator=generator), torch.rand(40, 5, generator=generator) * 3
        s_x, s_y = torch.cov(x.double().T), torch.cov(y.double().T)
        trace = linalg.sqrtm((s_x @ s_y).numpy()).trace().real
        expected = (x.double().mean(0) - y.double().mean(0)).square().sum() + s_x.trace() + s_y.trace() - 2 * trace
        assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-6)

    def test_same_set(self):
        x = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))  # fewer than dimensions: singular
        assert frechet_distance(x, x[torch.randperm(30)]) == pytest.approx(0, abs=1e-5)
        assert frechet_distance(x, x + 2) == pytest.approx(160, abs=1e-4)

    @pytest.mark.parametrize("shapes", [((3,), (3, 1)), ((3, 2), (3, 1)), ((1, 2), (3, 2))])
    def test_shapes_are_refused(self, shapes):
        with pytest.raises(ValueError, match=r"x and y must have shapes \(n, d\) and \(m, d\) with n, m >= 2, got"):
            frechet_distance(*map(torch.zeros, shapes))

    def test_nan_is_refused(self):
        with pytest.raises(ValueError, match="must be finite"):
            frechet_distance(torch.zeros(3, 2), torch.full((3, 2), math.nan))


class TestPerplexity:
    def test_units_weigh_the_same(self):
        # 6 log 2 nats over 4 units, not the mean of 2^2 and 2^1.
        nats = torch.tensor([4 * math.log(2), 2 * math.log(2)], dtype=torch.float64)
        assert perplexity(nats, torch.tensor([2, 2])) == pytest.approx(2**1.5, rel=1e-14)
        assert perplexity(nats, torch.tensor([1, 5])) == pytest.approx(2.0, rel=1e-14)
        assert perplexity(law(0.0, math.inf), torch.tensor([1, 1])) == math.inf

    def test_errors(self):
        with pytest.raises(ValueError, match=r"nats and counts must have one shape, got \(2,\) and \(1,\)"):
            perplexity(torch.zeros(2), torch.ones(1))
        for counts in ([0, 0], [2, -1]):
            with pytest.raises(ValueError, match="counts must be non-negative with a positive sum"):
                perplexity(torch.zeros(2), torch.tensor(counts))

    def test_generative_perplexity_pools_units(self):
        class Letters:
            """Each letter has probability 1/2, and a z has 1/8."""

            def log_prob(self, text: str) -> tuple[float, int]:
                return -sum(3 if letter == "z" else 1 for letter in text) * math.log(2), len(text)

        # (3 * 1 + 3) log 2 nats over 4 letters; the empty text adds nothing.
        assert generative_perplexity(["aaa", "z", ""], Letters()) == pytest.approx(2**1.5, rel=1e-14)
        with pytest.raises(ValueError, match="positive sum"):
            generative_perplexity([""], Letters())
        with pytest.raises(ValueError, match="got one str"):
            generative_perplexity("aaa", Letters())
        with pytest.raises(ValueError, match="at least one text"):
            generative_perplexity([], Letters())


def witten_bell(documents: list[list[str]], word: str, history: list[str]) -> float:
    """P(word | history) by the recursive definition, counting anew in every call."""
    followers = [
        document[i]
        for document in documents
        for i in range(len(history), len(document))
        if document[i - len(history) : i] == history
    ]
    is_new = all(word not in document for document in documents)
    shorter = witten_bell(documents, word, history[1:]) if history else float(is_new)
    if not followers:
        return shorter
    types = len(set(followers))
    return (followers.count(word) + types * shorter) / (len(followers) + types)


class TestNgramJudge:
    def test_bigram_by_hand(self):
        # "a b a c": N = 4, T = 3. After a: b, c once each (c(a) = 2, T(a) = 2). After b: a once. After c: nothing.
        judge = NgramJudge(["a b a c"], order=2)
        assert judge.vocabulary == {"a", "b", "c"}
        expected = {
            (): {"a": 2 / 7, "b": 1 / 7, "c": 1 / 7, "new": 3 / 7},
            ("a",): {"a": 4 / 28, "b": 9 / 28, "c": 9 / 28, "new": 6 / 28},
            ("b",): {"a": 9 / 14, "b": 1 / 14, "c": 1 / 14, "new": 3 / 14},
            ("c",): {"a": 2 / 7, "b": 1 / 7, "c": 1 / 7, "new": 3 / 7},
            ("new",): {"a": 2 / 7, "b": 1 / 7, "c": 1 / 7, "new": 3 / 7},
            ("b", "b", "a"): {"a": 4 / 28, "b": 9 / 28, "c": 9 / 28, "new": 6 / 28},  # one word of history counts
        }
        for history, laws in expected.items():
            for word, probability in laws.items():
                assert judge.probability(word, history) == pytest.approx(probability, rel=1e-14)
        log_prob, num_words = judge.log_prob("a b  a")
        assert log_prob == pytest.approx(math.log(2 / 7 * 9 / 28 * 9 / 14), rel=1e-14)
        assert num_words == 3
        assert judge.log_prob(" \n") == (0.0, 0)

    def test_spelling_by_hand(self):
        # Characters a, b, c and "other": K = 4. A word of two characters: 1 / (4 * 5^2).
        judge = NgramJudge(["a b a c"], order=2)
        log_prob, num_words = judge.log_prob("a ab")
        assert log_prob == pytest.approx(math.log(2 / 7 * 6 / 28 / 100), rel=1e-14)
        assert num_words == 2
        # Two characters never seen: 1 / 0x110000 more for each.
        log_prob, _ = judge.log_prob("zz")
        assert log_prob == pytest.approx(math.log(3 / 7 / 100) - 2 * math.log(0x110000), rel=1e-14)

    def test_spellings_sum_to_one(self):
        # One character "a": K = 2. All spellings of one length l hold 2^l / (2 * 3^l), up to length 30 1 - (2/3)^30.
        judge = NgramJudge(["a a"])
        total = math.fsum(
            math.comb(length, others)
            * math.exp(judge._spelling_log_prob("b" * others + "a" * (length - others)))
            * 0x110000**others
            for length in range(1, 31)
            for others in range(length + 1)
        )
        assert total == pytest.approx(1 - (2 / 3) ** 30, rel=1e-12)

    @pytest.mark.parametrize("order", [1, 2, 3, 4])
    def test_definition_and_sum_to_one(self, order):
        rng = random.Random(order)
        documents = [rng.choices("abcd", weights=[4, 3, 2, 1], k=length) for length in (1, 3, 12, 20)]
        judge = NgramJudge((" ".join(document) for document in documents), order=order)
        histories = [history for n in range(5) for history in itertools.product("abc?", repeat=n)]
        for history in rng.sample(histories, 40):
            kept = list(history[len(history) - min(order - 1, len(history)) :])
            laws = [judge.probability(word, history) for word in "abcd?"]
            assert laws == pytest.approx([witten_bell(documents, word, kept) for word in "abcd?"], rel=1e-12)
            assert sum(laws) == pytest.approx(1.0, abs=1e-12)

    def test_no_ngram_crosses_texts(self):
        apart, joined = NgramJudge(["a b", "c d"], order=2), NgramJudge(["a b c d"], order=2)
        assert apart.probability("c", ["b"]) == apart.probability("c")
        assert joined.probability("c", ["b"]) > joined.probability("c")

    def test_split(self):
        text = 'saying,"Hear us, God\'s people." --Is it 3?'
        words = ["saying", ",", '"', "Hear", "us", ",", "God's", "people", ".", '"', "-", "-", "Is", "it", "3", "?"]
        assert NgramJudge.split(text) == words

    def test_errors(self):
        with pytest.raises(ValueError, match="order must be at least 1, got 0"):
            NgramJudge(["a"], order=0)
        with pytest.raises(ValueError, match="got one str"):
            NgramJudge("in the beginning")
        with pytest.raises(ValueError, match="at least one text"):
            NgramJudge([])
        with pytest.raises(ValueError, match="at least one word"):
            NgramJudge([" ", ""])

    def test_tells_real_text_from_shuffled_words(self):
        with lzma.open(CORPUS / "train.txt.xz", "rt", encoding="utf-8") as file:
            judge = NgramJudge(itertools.islice(file, 150))
        with lzma.open(CORPUS / "validation.txt.xz", "rt", encoding="utf-8") as file:
            real = [line.strip() for line in itertools.islice(file, 5)]
        rng = random.Random(0)
        shuffled = [" ".join(rng.sample(words, len(words))) for words in map(NgramJudge.split, real)]
        assert 30 < generative_perplexity(real, judge) < 0.2 * generative_perplexity(shuffled, judge)
        # Over the whole vocabulary and <unk>, after histories of real text.
        words = NgramJudge.split(real[0])
        for history in ([], words[:1], words[40:42], words[60:63], ["never", "Zzz", "seen"]):
            total = math.fsum(judge.probability(word, history) for word in [*judge.vocabulary, "Zzz"])
            assert total == pytest.approx(1.0, abs=1e-9)


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate("<bos> <unk> the light was good and God saw".split())}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    # A tokenizer that would add its own <bos>: the judge must not let it.
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<bos>", model_max_length=12
    )


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if request.param == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=9, n_positions=12, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5
        )
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        vocab_size=9,
        max_position_embeddings=12,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    return transformers.LlamaForCausalLM(config).eval()


class TestCausalLMJudge:
    TEXT = "God saw the light and the light was good"
    IDS = [7, 8, 2, 3, 6, 2, 3, 4, 5]

    @torch.no_grad()
    def test_matches_the_loss_of_transformers(self, model, tokenizer):
        without_bos, num_tokens = CausalLMJudge(model, tokenizer).log_prob(self.TEXT)
        ids = torch.tensor([self.IDS])
        assert num_tokens == 8  # the first token is given
        assert without_bos == pytest.approx(-8 * model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)

        with_bos, num_tokens = CausalLMJudge(model, tokenizer, bos_token_id=0).log_prob(self.TEXT)
        ids = torch.tensor([[0, *self.IDS]])
        assert num_tokens == 9
        assert with_bos == pytest.approx(-9 * model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
        assert abs(with_bos - without_bos) > 0.1

    def test_probabilities_of_all_texts_sum_to_one(self, model, tokenizer):
        judge = CausalLMJudge(model, tokenizer, bos_token_id=0)
        words = list(tokenizer.get_vocab())
        texts = [" ".join(pair) for pair in itertools.product(words, repeat=2)]
        assert math.fsum(math.exp(judge.log_prob(text)[0]) for text in texts) == pytest.approx(1.0, abs=1e-5)

    def test_generative_perplexity(self, model, tokenizer):
        judge = CausalLMJudge(model, tokenizer, bos_token_id=0)
        log_probs = [judge.log_prob(text)[0] for text in ("the light", "God saw the")]
        expected = math.exp(-sum(log_probs) / 5)
        assert generative_perplexity(["the light", "God saw the"], judge) == pytest.approx(expected, rel=1e-12)

    def test_no_token_to_score(self, model, tokenizer):
        assert CausalLMJudge(model, tokenizer).log_prob("light") == (0.0, 0)
        assert CausalLMJudge(model, tokenizer, bos_token_id=0).log_prob("") == (0.0, 0)
        assert CausalLMJudge(model, tokenizer, bos_token_id=0).log_prob("light")[1] == 1

    def test_errors(self, model, tokenizer):
        judge = CausalLMJudge(model, tokenizer, bos_token_id=0)
        assert judge.log_prob("the " * 11)[1] == 11
        with pytest.raises(ValueError, match="text must fit into 12 tokens, got 13"):
            judge.log_prob("the " * 12)
        model.train()
        try:
            with pytest.raises(ValueError, match="eval mode"):
                judge.log_prob(self.TEXT)
        finally:
            model.eval()

    def test_is_frozen(self, model, tokenizer):
        with pytest.raises(dataclasses.FrozenInstanceError):
            CausalLMJudge(model, tokenizer).bos_token_id = 0


class TestMeanAndError:
    def test_by_hand(self):
        # Squares of deviations 1 + 0 + 1, over n - 1 = 2: variance 1, error 1 / sqrt 3.
        assert mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / math.sqrt(3)), abs=1e-15)
        assert mean_and_error([5.0, 5.0]) == (5.0, 0.0)

    @pytest.mark.parametrize("values", [[], [1.0]])
    def test_errors(self, values):
        with pytest.raises(ValueError, match=rf"at least 2 numbers .* got {len(values)}"):
            mean_and_error(values)


class TestSamplerNllBound:
    """With exact conditionals and one token per step every order gives -log p(x_0) itself, by the chain rule."""

    @staticmethod
    def problem(**arguments):
        joint = random_joint(2, 4)
        scheduler = AncestralScheduler(3, 2, **arguments)
        return joint, exact_denoiser(joint, scheduler.noise_process), scheduler

    @pytest.mark.parametrize("order", ["random", "spread"])
    def test_one_token_per_step_is_exact(self, order):
        joint, denoiser, scheduler = self.problem(order=order)
        bounds = sampler_nll_bound(denoiser, scheduler, joint.states, 4, torch.Generator().manual_seed(0))
        torch.testing.assert_close(bounds, -joint.p.log() / 4)

    @pytest.mark.parametrize("frozen", [[True, False, False, True], [False, True, False, False]])
    def test_frozen_positions_are_given(self, frozen):
        joint, denoiser, scheduler = self.problem()
        given = torch.tensor(frozen)
        steps = int((~given).sum())
        bounds = sampler_nll_bound(
            denoiser, scheduler, joint.states, steps, torch.Generator().manual_seed(0), frozen=given
        )
        same = (joint.states[:, None] == joint.states)[..., given].all(-1).double()  # rows that agree on what is given
        torch.testing.assert_close(bounds, -(joint.p / (same @ joint.p)).log() / steps)

    def test_frozen_positions_with_openings_that_depend_on_the_logits(self):
        joint, denoiser, _ = self.problem()
        scheduler = LSDScheduler(3, 2, scale="log_score", coefficients={"2": {"scale": [1.3, 1.0]}})
        given = torch.tensor([True, True, True, False])  # one free token
        bounds = sampler_nll_bound(denoiser, scheduler, joint.states, 2, torch.Generator().manual_seed(0), frozen=given)
        pair = joint.p.view(8, 2)
        p = pair / pair.sum(1, keepdim=True)
        powered = p**1.3 / (p**1.3).sum(1, keepdim=True)
        expected = torch.stack([-p.log().flatten(), -powered.log().flatten()])
        gap = (bounds - expected).abs().min(0).values  # opened in the first step or in the last
        assert gap.max() < 1e-12
        assert ((bounds - expected[1]).abs() < 1e-12).any()

    @pytest.mark.parametrize(
        "frozen", [torch.ones(4, dtype=torch.bool), torch.zeros(3, dtype=torch.bool), torch.zeros(4)]
    )
    def test_frozen_is_checked(self, frozen):
        joint, denoiser, scheduler = self.problem()
        with pytest.raises(ValueError, match="`frozen`"):
            sampler_nll_bound(denoiser, scheduler, joint.states, 2, frozen=frozen)
