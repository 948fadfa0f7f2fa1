import math
from functools import partial

import mlx.core as mx
import mlx_lm.sample_utils as mlx_sampling
import numpy as np
import pytest
import torch
from torch import Tensor

from gfxlm.engine import sampler as sampling
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.sampler import Features, Sampler
from gfxlm.errors import UserError
from tests.engine.sampling_oracle import PENALTIES, V, chain_of_mlx, kept, logits_of_mlx, random_logprobs

ALL = SamplingParams(
    temperature=0.8,
    top_p=0.9,
    top_k=12,
    min_p=0.01,
    min_tokens_to_keep=3,
    xtc_probability=0.5,
    xtc_threshold=0.05,
    xtc_special_tokens=(4, 5),
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.2,
    logit_bias={3: 2.0, 90: -math.inf},
    seed=11,
    logprobs=True,
)


def in_order(logprobs: Tensor, keep, special: Tensor | None = None) -> Tensor:
    """Apply one of our filters, which want descending rows, and put the result back in vocabulary order."""
    values, tokens = logprobs.sort(dim=1, descending=True)
    filtered = keep(values) if special is None else keep(values, special=special.gather(1, tokens))
    return torch.empty_like(logprobs).scatter_(1, tokens, filtered)


def column(value: float) -> Tensor:
    return torch.tensor([[value]])


def draws(params: SamplingParams, logits: Tensor, n: int) -> np.ndarray:
    """How often each token is drawn from logits (V,) in n steps of one request."""
    sampler = Sampler(1, len(logits))
    sampler.set(0, params)
    tokens, _, _ = sampler.sample(logits.expand(n, -1), torch.zeros(n, dtype=torch.int64), torch.arange(n))
    return np.bincount(tokens.numpy(), minlength=len(logits))


class TestFiltersKeepWhatMlxKeeps:
    @pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999])
    def test_top_p(self, top_p):
        logprobs = random_logprobs()
        ours = in_order(logprobs, partial(sampling.keep_top_p, top_p=column(top_p)))
        theirs = mlx_sampling.apply_top_p(mx.array(logprobs.numpy()), top_p)
        # Where a sum comes within fp32's rounding of top_p, either answer is right.
        mass = logprobs.double().exp().sort(dim=1, descending=True)[0].cumsum(dim=1)
        clear = ((mass - top_p).abs() > 1e-6).all(dim=1).numpy()
        assert clear.mean() > 0.9
        np.testing.assert_array_equal(kept(ours)[clear], kept(theirs)[clear])

    def test_top_p_met_exactly(self):
        logprobs = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log2() * math.log(2)
        ours = sampling.keep_top_p(logprobs, column(0.5))
        theirs = mlx_sampling.apply_top_p(mx.array(logprobs.numpy()), 0.5)
        assert kept(ours).tolist() == kept(theirs).tolist() == [[True, False, False, False]]

    def test_top_p_of_the_likeliest_alone(self):
        # The rest counts although it is not there: no sum is made one again.
        logprobs = random_logprobs(spread=0.3).sort(dim=1, descending=True)[0]
        every, some = (sampling.keep_top_p(logprobs[:, :width], column(0.35)) for width in (V, 40))
        np.testing.assert_array_equal(kept(every)[:, :40], kept(some))
        assert not kept(some)[:, -1].any()

    @pytest.mark.parametrize("min_tokens_to_keep", [1, 5, V])
    @pytest.mark.parametrize("min_p", [0.001, 0.05, 0.5, 1.0])
    def test_min_p(self, min_p, min_tokens_to_keep):
        logprobs = random_logprobs()
        keep = partial(
            sampling.keep_min_p,
            log_min_p=column(math.log(min_p)),
            min_tokens_to_keep=torch.tensor([[min_tokens_to_keep]]),
        )
        theirs = mlx_sampling.apply_min_p(mx.array(logprobs.numpy()), min_p, min_tokens_to_keep)
        np.testing.assert_array_equal(kept(in_order(logprobs, keep)), kept(theirs))

    @pytest.mark.parametrize("top_k", [1, 5, V - 1])
    def test_top_k(self, top_k):
        logprobs = random_logprobs()
        ours = in_order(logprobs, partial(sampling.keep_top_k, top_k=torch.tensor([[top_k]])))
        theirs = mlx_sampling.apply_top_k(mx.array(logprobs.numpy()), top_k)
        np.testing.assert_array_equal(kept(ours), kept(theirs))

    @pytest.mark.parametrize("special", [[], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
    @pytest.mark.parametrize("threshold", [0.0, 0.02, 0.1, 0.5])
    def test_xtc(self, threshold, special):
        logprobs = random_logprobs()
        marked = torch.zeros(64, V, dtype=torch.bool)
        marked[:, special] = True
        keep = partial(
            sampling.exclude_top_choices,
            threshold=column(threshold),
            probability=column(1.0),
            coin=column(0.5),
        )
        theirs = mlx_sampling.apply_xtc(mx.array(logprobs.numpy()), 1.0, threshold, special)
        np.testing.assert_array_equal(kept(in_order(logprobs, keep, marked)), kept(theirs))

    def test_equals_stay_together(self):
        # bf16 logits often tie; which one a sort puts first must not matter.
        logprobs = torch.log(torch.tensor([[0.3, 0.2, 0.2, 0.2, 0.1]]))
        top_k = sampling.keep_top_k(logprobs, torch.tensor([[2]]))
        top_p = sampling.keep_top_p(logprobs, column(0.4))
        assert kept(top_k).tolist() == kept(top_p).tolist() == [[True, True, True, True, False]]


class TestDistribution:
    @pytest.mark.parametrize(
        "params",
        [
            SamplingParams(temperature=1.0),
            SamplingParams(temperature=0.5),
            SamplingParams(temperature=1.7, top_k=5),
            SamplingParams(temperature=1.0, top_p=0.8),
            SamplingParams(temperature=1.0, top_p=0.95, min_p=0.02, top_k=6),
            SamplingParams(temperature=1.0, min_p=0.3, min_tokens_to_keep=4),
            SamplingParams(
                temperature=1.3,
                top_p=0.97,
                min_p=0.001,
                xtc_probability=1.0,
                xtc_threshold=0.07,
                xtc_special_tokens=(2,),
                top_k=5,
            ),
        ],
        ids=["plain", "cold", "top_k", "top_p", "top_p min_p top_k", "min_p and at least 4", "everything"],
    )
    def test_draws_follow_the_filtered_softmax(self, params):
        logits = torch.randn(24) * 1.5
        n = 20_000
        filtered = np.array(chain_of_mlx(torch.log_softmax(logits, 0)[None], params))[0].astype(np.float64)
        weights = np.exp(filtered / params.temperature)
        expected = n * weights / weights.sum()
        counts = draws(params, logits, n)
        assert counts[expected == 0].sum() == 0
        # The test is only as good as its counts are large: rare tokens share one bin.
        common = expected >= 5
        expected = np.append(expected[common], expected[~common].sum())
        counts = np.append(counts[common], counts[~common].sum())
        used = expected > 0
        statistic = ((counts - expected)[used] ** 2 / expected[used]).sum()
        freedom = used.sum() - 1
        assert statistic < freedom + 4 * math.sqrt(2 * freedom)

    def test_xtc_strikes_as_often_as_asked(self):
        logits = torch.tensor([5.0, 4.5, 0.0, 0.0])
        n = 10_000
        counts = draws(SamplingParams(temperature=1.0, xtc_probability=0.25, seed=1), logits, n)
        likeliest = torch.softmax(logits, 0)[0].item() * 0.75
        assert abs(counts[0] / n - likeliest) < 5 * math.sqrt(likeliest * (1 - likeliest) / n)

    def test_the_position_keys_the_draw(self):
        logits = torch.randn(1, V)
        sampler = Sampler(2, V)
        sampler.set(0, SamplingParams(temperature=2.0, seed=5))
        sampler.set(1, SamplingParams(temperature=2.0, seed=6))
        steps = torch.arange(50)

        def run(slot: int) -> list[int]:
            return sampler.sample(logits.expand(50, -1), torch.full((50,), slot), steps)[0].tolist()

        first = run(0)
        assert first == run(0)
        assert len(set(first)) > 10
        assert first != run(1)

    def test_without_a_seed_torch_gives_one(self):
        def run() -> list[int]:
            return draws(SamplingParams(temperature=2.0), torch.zeros(V), 50).tolist()

        torch.manual_seed(1)
        first, second = run(), run()
        torch.manual_seed(1)
        assert run() == first != second

    @pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-6, 1e-5])
    def test_a_tiny_temperature_is_greedy(self, temperature):
        logits = torch.tensor([1.0, 3.0, 2.99, -400.0])
        counts = draws(SamplingParams(temperature=temperature), logits, 100)
        assert counts.tolist() == [0, 100, 0, 0]


class TestLogitsProcessors:
    @pytest.mark.parametrize("settings", PENALTIES, ids=str)
    @pytest.mark.parametrize("prompt_length", [0, 3, 30])
    def test_sampler_over_many_steps(self, settings, prompt_length):
        # The ring of 20 tokens goes round more than once; slot 1 must not see what slot 2 does.
        sampler = Sampler(3, 16, max_context=20)
        tokens = torch.randint(16, (prompt_length,)).tolist()
        sampler.set(1, SamplingParams(**settings, logprobs=True), tokens)
        sampler.set(2, SamplingParams(**settings), [5, 5, 5])
        for step in range(40):
            logits = torch.randn(2, 16)
            expected = logits_of_mlx(settings, tokens, logits[:1])[0].astype(np.float64)
            expected -= np.log(np.exp(expected).sum())
            chosen, logprobs, _ = sampler.sample(logits, torch.tensor([1, 2]), torch.tensor([step, step]))
            np.testing.assert_allclose(logprobs[0].numpy(), expected, rtol=1e-5, atol=1e-6)
            assert chosen[0] == expected.argmax()
            tokens.append(int(chosen[0]))

    def test_banned_token(self):
        sampler = Sampler(1, 4)
        sampler.set(0, SamplingParams(temperature=1.0, logit_bias={2: -math.inf}))
        logits = torch.tensor([[0.0, 0.0, 50.0, 0.0]]).expand(100, -1)
        tokens, _, _ = sampler.sample(logits, torch.zeros(100, dtype=torch.int64), torch.arange(100))
        assert set(tokens.tolist()) == {0, 1, 3}


class TestSampler:
    def test_greedy_and_its_logprobs(self):
        logits = torch.randn(5, V).to(torch.bfloat16)
        sampler = Sampler(5, V)
        slots, positions = torch.arange(5), torch.zeros(5, dtype=torch.int64)
        tokens, logprobs, _ = sampler.sample(logits, slots, positions)
        assert tokens.tolist() == logits.argmax(1).tolist()
        assert logprobs is None
        sampler.set(3, SamplingParams(logprobs=True))
        _, logprobs, _ = sampler.sample(logits, slots, positions)
        torch.testing.assert_close(logprobs.double(), torch.log_softmax(logits.double(), 1), rtol=0, atol=2e-6)

    @pytest.mark.parametrize("params", [SamplingParams(), ALL], ids=["greedy", "all"])
    def test_rows_without_a_finite_maximum(self, params):
        nan, inf = math.nan, math.inf
        logits = torch.randn(5, V)
        logits[1, 60] = nan
        logits[2] = -inf
        logits[3, 8] = inf
        sampler = Sampler(5, V)
        for slot in range(5):
            sampler.set(slot, params, [1, 2])
        alone = [sampler.sample(logits[i : i + 1], torch.tensor([i]), torch.tensor([0]))[0] for i in (0, 4)]
        for slot in range(5):
            sampler.set(slot, params, [1, 2])
        tokens, _, _ = sampler.sample(logits, torch.arange(5), torch.zeros(5, dtype=torch.int64))
        assert tokens.tolist() == [alone[0], -1, -1, -1, alone[1]]
        # The -1 is in the histories now, and does no harm there.
        tokens, _, _ = sampler.sample(torch.randn(5, V), torch.arange(5), torch.ones(5, dtype=torch.int64))
        assert (tokens >= 0).all()

    @pytest.mark.parametrize(
        "params",
        [
            SamplingParams(),
            SamplingParams(temperature=1.0, seed=1),
            SamplingParams(temperature=0.9, top_k=7, seed=2),
            SamplingParams(temperature=0.9, top_k=7, top_p=0.9, seed=3),
            SamplingParams(temperature=0.9, min_p=0.1, seed=4),
            SamplingParams(repetition_penalty=1.5, logprobs=True),
            SamplingParams(logit_bias={5: 3.0}, logprobs=True),
            ALL,
        ],
        ids=["greedy", "plain", "top_k", "top_k top_p", "min_p", "repetition", "bias", "all"],
    )
    def test_company_changes_nothing(self, params):
        def run(*, company: bool) -> tuple[list[int], Tensor | None]:
            sampler = Sampler(3, V)
            sampler.set(1, params, [7, 8, 9])
            slots = [1]
            if company:
                # Slot 0 has had another request with everything on; slot 2 still has one.
                sampler.set(0, ALL, [1])
                sampler.clear(0)
                sampler.set(2, ALL, [2, 3])
                slots = [0, 1, 2]
            tokens = []
            for step in range(30):
                logits = torch.randn(1, V, generator=torch.Generator().manual_seed(step)).expand(len(slots), -1)
                chosen, logprobs, _ = sampler.sample(logits, torch.tensor(slots), torch.full((len(slots),), step))
                tokens.append(int(chosen[slots.index(1)]))
            return tokens, None if logprobs is None else logprobs[slots.index(1)]

        (alone, logprobs), (together, logprobs_together) = run(company=False), run(company=True)
        assert alone == together
        if params.logprobs:
            assert torch.equal(logprobs, logprobs_together)

    def test_a_cleared_slot_is_as_new(self):
        sampler = Sampler(2, V)
        sampler.set(0, ALL, [1, 2, 3])
        sampler.clear(0)
        assert sampler.features == Features()
        # Were the old bias still there, it would come back with the next request that has one.
        sampler.set(1, SamplingParams(logit_bias={1: 1.0}))
        logits = torch.randn(1, V)
        logits[0, 90] = 9.0
        assert sampler.sample(logits, torch.tensor([0]), torch.tensor([0]))[0].item() == 90

    def test_state_never_moves(self):
        sampler = Sampler(2, V)

        def addresses() -> list[int]:
            return [value.data_ptr() for value in vars(sampler).values() if isinstance(value, Tensor)]

        before = addresses()
        assert len(before) >= 5
        for step in range(3):
            sampler.set(step % 2, ALL, list(range(step * 50)))
            sampler.sample(torch.randn(2, V), torch.arange(2), torch.full((2,), step))
        assert addresses() == before

    def test_the_host_reads_nothing_back(self):
        # A meta tensor has no values: whatever asks for one raises.
        sampler = Sampler(3, V, device="meta")
        sampler.set(1, ALL, [1, 2, 3])
        rows = torch.empty(3, dtype=torch.int64, device="meta")
        tokens, logprobs, _ = sampler.sample(torch.empty(3, V, device="meta"), rows, rows)
        assert tokens.shape == (3,)
        assert logprobs.shape == (3, V)

    def test_features_are_the_union(self):
        sampler = Sampler(3, 1000)
        assert sampler.features == Features()
        sampler.set(0, SamplingParams(temperature=0.6, top_k=20, top_p=0.95))
        assert sampler.features == Features(sampling=True, top_k=True, top_p=True, width=32)
        sampler.set(1, SamplingParams(temperature=0.6, min_p=0.1))
        assert sampler.features == Features(sampling=True, top_k=True, top_p=True, min_p=True, width=1000)
        # A greedy request's filters and neutral penalties want nothing.
        sampler.set(0, SamplingParams(top_k=5, top_p=0.5, repetition_penalty=1.0, presence_penalty=0.0))
        assert sampler.features == Features(sampling=True, min_p=True, width=1000)

    @pytest.mark.parametrize("top_k", [V, V + 1, 10**6])
    def test_top_k_of_the_whole_vocabulary_is_off(self, top_k):
        logits = torch.randn(V)
        plain = draws(SamplingParams(temperature=1.0, seed=1), logits, 200)
        assert draws(SamplingParams(temperature=1.0, seed=1, top_k=top_k), logits, 200).tolist() == plain.tolist()

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            (
                SamplingParams(repetition_penalty=1.1, repetition_context_size=33),
                "repetition_context_size is 33",
            ),
            (SamplingParams(logit_bias={V: 1.0}), "logit_bias names token 97, but the vocabulary has 97"),
            (SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0)), "logit_bias names 1025 tokens"),
            (SamplingParams(xtc_special_tokens=[1] * 65), "xtc_special_tokens names 65 tokens"),
            (SamplingParams(xtc_special_tokens=[V]), "xtc_special_tokens names token 97"),
        ],
    )
    def test_what_it_cannot_hold(self, params, message):
        sampler = Sampler(1, V, max_context=32)
        with pytest.raises(UserError, match=message):
            sampler.set(0, params)
        assert sampler.features == Features()

    def test_logits_of_another_vocabulary(self):
        with pytest.raises(ValueError, match=r"logits must be \(rows, 97\), but are \(1, 98\)"):
            Sampler(1, V).sample(torch.zeros(1, 98), torch.tensor([0]), torch.tensor([0]))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    @pytest.mark.parametrize("vocab_size", [V, 151_936])
    def test_a_captured_step_is_the_eager_step(self, vocab_size):
        def new() -> Sampler:
            sampler = Sampler(3, vocab_size, device="cuda")
            sampler.set(1, ALL, [1, 2, 3])
            sampler.set(2, SamplingParams(temperature=1.0, seed=4, presence_penalty=1.0), [4])
            return sampler

        eager, captured, slots = new(), new(), torch.tensor([2, 0, 1], device="cuda")
        logits = torch.randn(3, vocab_size, device="cuda")
        positions = torch.zeros(3, dtype=torch.int64, device="cuda")
        warm_up = torch.cuda.Stream()
        with torch.cuda.stream(warm_up):
            new().sample(logits, slots, positions)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            tokens, logprobs, _ = captured.sample(logits, slots, positions)
        for _ in range(30):
            logits.copy_(torch.randn(3, vocab_size))
            expected_tokens, expected_logprobs, _ = eager.sample(logits, slots, positions)
            graph.replay()
            assert torch.equal(tokens, expected_tokens)
            assert torch.equal(logprobs, expected_logprobs)
            positions += 1
