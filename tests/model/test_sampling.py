"""The sampler against the definition: sort everything, cut the nucleus, draw by inverse CDF; all in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from torch import Tensor

from persona_axis.model import sampling
from persona_axis.model.sampling import FIRST_SELECTION, sample

SLACK = 2e-5  # of float32 sums over a vocabulary


def nucleus(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """Probabilities ``[vocabulary]`` in a row's nucleus: the smallest set of likeliest tokens that reaches top_p."""
    x = logits.astype(np.float64) / temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    order = np.argsort(-logits, kind="stable")  # not by p: logits a hair apart are equal once exponentiated
    before = np.cumsum(p[order]) - p[order]
    kept = np.zeros_like(p)
    inside = order[before < top_p] if top_p < 1 else order
    kept[inside] = p[inside]
    return kept / kept.sum()


def border(logits: np.ndarray, temperature: float, top_p: float) -> float:
    """How near top_p comes to the mass of some set of most probable tokens: there float32 may decide differently."""
    x = logits.astype(np.float64) / temperature
    p = np.sort(np.exp(x - x.max()))[::-1]
    return float(np.abs(np.cumsum(p / p.sum()) - top_p).min())


def grid_counts(logits: Tensor, temperature: float, top_p: float, n: int) -> np.ndarray:
    """How often each token is drawn when the uniforms are the ``n`` midpoints of [0, 1)."""
    uniforms = (torch.arange(n) + 0.5) / n
    tokens, _ = sample(logits.repeat(n, 1), uniforms, temperature, top_p)
    return np.bincount(tokens.numpy(), minlength=logits.shape[-1])


def check_grid(logits: np.ndarray, temperature: float, top_p: float, n: int = 2000) -> None:
    """Each token gets its share of the uniforms, up to one at either end of its interval; equal tokens as a class."""
    counts = grid_counts(torch.from_numpy(logits)[None], temperature, top_p, n)
    expected = nucleus(logits, temperature, top_p)
    for value in np.unique(logits):
        equal = logits == value
        wanted, got = n * expected[equal].sum(), counts[equal].sum()
        intervals = int((expected[equal] > 0).sum()) if top_p == 1 else 1  # a sorted class is one interval
        assert abs(got - wanted) <= intervals + n * SLACK, (value, got, wanted)


rows = hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-6, 6, width=32))
tied_rows = hnp.arrays(np.float32, st.integers(1, 200), elements=st.sampled_from([-3.0, -1.0, 0.0, 0.5, 4.0]))
temperatures = st.floats(0.2, 3)
masses = st.floats(0.02, 0.999)
property_settings = settings(max_examples=80, deadline=None, derandomize=True)


class TestDistribution:
    @property_settings
    @given(logits=rows, temperature=temperatures, top_p=masses)
    def test_nucleus(self, logits: np.ndarray, temperature: float, top_p: float) -> None:
        assume(border(logits, temperature, top_p) > 1e-5)
        check_grid(logits, temperature, top_p)

    @property_settings
    @given(logits=tied_rows, temperature=temperatures, top_p=masses)
    def test_ties(self, logits: np.ndarray, temperature: float, top_p: float) -> None:
        assume(border(logits, temperature, top_p) > 1e-5)
        check_grid(logits, temperature, top_p)

    @property_settings
    @given(logits=st.one_of(rows, tied_rows), temperature=temperatures)
    def test_the_whole_distribution(self, logits: np.ndarray, temperature: float) -> None:
        check_grid(logits, temperature, 1.0)

    @pytest.mark.parametrize("vocabulary", [FIRST_SELECTION - 1, FIRST_SELECTION, FIRST_SELECTION + 1, 700, 1500])
    @pytest.mark.parametrize("top_p", [0.0503, 0.5003, 0.9003, 0.9998])
    def test_flat_distributions(self, vocabulary: int, top_p: float) -> None:
        # The nucleus is larger than the first selection, and than the second.
        logits = np.zeros(vocabulary, np.float32)
        assert border(logits, 1.0, top_p) > 1e-5
        counts = grid_counts(torch.from_numpy(logits)[None], 1.0, top_p, 2 * vocabulary)
        size = int((nucleus(logits, 1.0, top_p) > 0).sum())
        assert (counts > 0).sum() == size
        assert np.abs(counts[counts > 0] - 2 * vocabulary / size).max() <= 1 + 2 * vocabulary * SLACK

    def test_nearly_flat(self) -> None:
        logits = np.random.default_rng(0).normal(0, 0.3, 3000).astype(np.float32)
        check_grid(logits, 0.7, 0.95, n=2000)

    def test_a_large_vocabulary(self) -> None:
        logits = np.random.default_rng(1).normal(0, 2, 20_000).astype(np.float32)
        check_grid(logits, 0.7, 0.9, n=100)

    @pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-24])
    @pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
    def test_the_ends_of_the_unit_interval(self, uniform: float, top_p: float) -> None:
        # The outermost tokens have probability zero; rounding must not reach them.
        logits = torch.tensor([[-1e30, 1.0, 0.0, 2.0, -1e30]]).repeat(4, 1)
        tokens, logprobs = sample(logits, torch.full((4,), uniform), 0.7, top_p)
        assert all(1 <= t <= 3 for t in tokens.tolist())
        assert logprobs.isfinite().all()

    @pytest.mark.parametrize("top_p", [0.99, 1.0])
    def test_intervals_are_closed_below(self, top_p: float) -> None:
        tokens, _ = sample(torch.zeros(4, 4), torch.tensor([0.0, 0.25, 0.5, 0.75]), 1.0, top_p)
        assert sorted(tokens.tolist()) == [0, 1, 2, 3]

    def test_a_tiny_nucleus_is_greedy(self) -> None:
        logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(2))
        tokens, _ = sample(logits, torch.rand(50), 1.0, 1e-6)
        assert tokens.tolist() == logits.argmax(-1).tolist()

    @pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 0.9), (1.0, 0.95), (1.3, 1.0), (2.0, 0.999)])
    def test_chi_square(self, temperature: float, top_p: float) -> None:
        n = 20_000
        logits = np.random.default_rng(3).normal(0, 1.5, 150).astype(np.float32)
        uniforms = torch.from_numpy(np.random.default_rng(4).random(n, dtype=np.float32))
        tokens, _ = sample(torch.from_numpy(logits).expand(n, -1), uniforms, temperature, top_p)
        counts = np.bincount(tokens.numpy(), minlength=len(logits))
        expected = n * nucleus(logits, temperature, top_p)
        assert counts[expected == 0].sum() == 0
        often = expected >= 5
        rest = n - expected[often].sum()
        observed = [*counts[often], *([n - counts[often].sum()] if rest > 1e-6 else [])]
        wanted = [*expected[often], *([rest] if rest > 1e-6 else [])]
        assert stats.chisquare(observed, wanted, sum_check=False).pvalue > 0.01


class TestGreedy:
    def test_the_most_probable(self) -> None:
        logits = torch.randn(20, 300, generator=torch.Generator().manual_seed(5))
        for uniform in (0.0, 0.5, 0.999):
            tokens, _ = sample(logits, torch.full((20,), uniform), 0, 0.9)
            assert tokens.tolist() == logits.argmax(-1).tolist()

    def test_the_first_of_equals(self) -> None:
        logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
        assert sample(logits, torch.zeros(2), 0, 1)[0].tolist() == [1, 0]


class TestLogProbabilities:
    @pytest.mark.parametrize("temperature", [0, 0.4, 1, 2.5])
    @pytest.mark.parametrize("top_p", [0.3, 0.95, 1])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_full_softmax_at_temperature_one(self, temperature: float, top_p: float, dtype: Any) -> None:
        random = torch.Generator().manual_seed(6)
        logits = (5 * torch.randn(40, 1000, generator=random)).to(dtype)
        logits[20:] /= 50  # flat rows: the selection is widened
        tokens, logprobs = sample(logits.clone(), torch.rand(40, generator=random), temperature, top_p)
        expected = logits.double().log_softmax(-1)[torch.arange(40), tokens]
        assert logprobs.dtype == torch.float32
        assert tokens.dtype == torch.int64
        np.testing.assert_allclose(logprobs.numpy(), expected.numpy(), atol=2e-5)

    def test_large_logits(self) -> None:
        logits = torch.tensor([[1e4, 1e4 - 1, -1e4], [-1e4, -1e4 - 1, -3e4]])
        for temperature, top_p in ((0, 1), (1, 0.9), (1, 1)):
            tokens, logprobs = sample(logits, torch.zeros(2), temperature, top_p)
            assert tokens.tolist() == [0, 0]
            np.testing.assert_allclose(logprobs.numpy(), [-np.log1p(np.exp(-1))] * 2, atol=1e-5)


class TestRowsAreIndependent:
    @pytest.mark.parametrize(("temperature", "top_p"), [(0, 1), (0.7, 0.9), (0.7, 1), (1.5, 0.99)])
    @pytest.mark.parametrize("slice_elements", [1, 3 * 400, 1 << 20])
    def test_alone_or_in_a_batch(
        self, temperature: float, top_p: float, slice_elements: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sampling, "SLICE_ELEMENTS", slice_elements)
        random = torch.Generator().manual_seed(7)
        logits = torch.randn(64, 400, generator=random) * torch.linspace(0.01, 6, 64)[:, None]  # flat to peaked
        logits = logits[torch.randperm(64, generator=random)]
        uniforms = torch.rand(64, generator=random)
        tokens, logprobs = sample(logits, uniforms, temperature, top_p)
        for i in range(64):
            token, logprob = sample(logits[i : i + 1], uniforms[i : i + 1], temperature, top_p)
            assert token.item() == tokens[i]
            assert float(logprob) == pytest.approx(float(logprobs[i]), abs=1e-5)

    def test_a_row_of_nan_spoils_no_other(self) -> None:
        logits = torch.randn(5, 200, generator=torch.Generator().manual_seed(8))
        uniforms = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
        spoiled = logits.clone()
        spoiled[2] = float("nan")
        for temperature, top_p in ((0, 1), (0.8, 0.9), (0.8, 1)):
            expected, _ = sample(logits, uniforms, temperature, top_p)
            tokens, logprobs = sample(spoiled, uniforms, temperature, top_p)
            others = [0, 1, 3, 4]
            assert tokens[others].tolist() == expected[others].tolist()
            assert 0 <= int(tokens[2]) < 200
            assert logprobs[2].isnan()
