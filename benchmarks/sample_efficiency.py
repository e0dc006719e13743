"""Reliability of the axis against the number of rollouts: our design against the reference's.

    python -m benchmarks --only sample_efficiency

Aim: 10 times fewer rollouts at equal reliability. A pool of rollouts (24 roles, 60 questions, the default persona under
all 5 default prompts; embedded model, 24 tokens) is sampled again and again, n questions per sample:

- ours: every role answers the same n questions once, the default persona the same ones under all 5 prompts; on these
  complete tables the paired estimator is plain means. n x (roles + 5) rollouts.
- reference: every role answers the same n questions once, the default persona n *other* questions, each under a random
  default prompt; plain means. n x (roles + 1) rollouts.

Reliability at a budget is the mean cosine of axes from two samples of that budget *each* that share no question: it is
that budget's own, nothing is stepped up. Roles are fixed, no filter. The ratio is the reference's rollouts at its
largest budget over ours at equal reliability, interpolated in log rollouts against logit reliability (beyond the ends
at slope 1, which is the Spearman-Brown formula; `extrapolated` says when). Interval: the same figure from random
halves of the questions, whose spread is the sampling error of the whole, put around the whole's figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import Claim, Ratio, Result, alone
from benchmarks.pool import Pool, make_pool

AIM = 10
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 25, 30)
SAMPLES, HALVES, HALF_SAMPLES = 1000, 200, 200

# (permuted questions [N, Q], n, pool, generator) -> two samples' weights [N, prompts x Q + Q] on the pool's cells.
Design = Callable[[Tensor, int, Pool, torch.Generator], tuple[Tensor, Tensor]]


def run(quick: bool = False) -> Iterator[Result]:
    roles, questions, tokens = (4, 8, 8) if quick else (24, 60, 24)
    pool = make_pool(roles, questions, tokens, "pool-quick" if quick else "pool")
    gram = gram_matrices(pool)
    samples, halves, per_half = (50, 8, 20) if quick else (SAMPLES, HALVES, HALF_SAMPLES)
    everything = torch.arange(pool.n_questions)
    whole = curves(pool, gram, everything, samples, seed=0)
    parts = [
        curves(
            pool, gram, torch.from_numpy(np.random.default_rng(i).permutation(questions)[: questions // 2]), per_half, i
        )
        for i in range(1, halves + 1)
    ]
    settings = {"model": "embedded", "roles": pool.n_roles, "questions": questions, "tokens": tokens}
    settings |= {"pool_rollouts": pool.rollouts, "without_activation": pool.without_activation, "layers": pool.layers}
    for where, pick in (("middle layer", pool.middle), ("middle half", None)):
        ours, theirs = (at(curve, pick) for curve in whole)
        value, extrapolated = ratio_at_equal(ours, theirs)
        spread = [np.log(ratio_at_equal(at(a, pick), at(b, pick))[0]) for a, b in parts]
        low, high = value * np.exp(np.quantile(spread, [0.025, 0.975]) - np.median(spread))
        claim = Claim(f"sample efficiency, {where}", "10 x fewer rollouts (aim)", AIM, "x rollouts of the reference")
        details = {"ours": ours, "reference": theirs, "extrapolated": extrapolated}
        details["ratio_by_reference_budget"] = {
            str(n): ratio_at_equal(ours, dict([point]))[0] for point in theirs.items() for n in [point[0]]
        }
        details |= {name: {str(n): r for n, r in details[name].items()} for name in ("ours", "reference")}
        yield Result(claim, Ratio(float(value), float(low), float(high), len(parts)), settings, details)


def gram_matrices(pool: Pool) -> Tensor:
    """Inner products of all cells, per layer ``[L, C, C]``: default by prompt and question, then the roles' means."""
    cells = torch.cat([pool.default.flatten(1, 2), pool.roles], 1).double()
    cells = cells - cells.mean(1, keepdim=True)  # an axis's weights sum to 0: only rounding changes
    return (cells @ cells.transpose(1, 2)).float()


def ours(order: Tensor, n: int, pool: Pool, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Same questions for all, the default persona under every prompt."""
    prompts = torch.arange(pool.n_prompts)

    def weights(asked: Tensor) -> Tensor:
        cells = (prompts[:, None, None] * pool.n_questions + asked).permute(1, 0, 2).flatten(1)
        return _weights(cells, asked, pool)

    return weights(order[:, :n]), weights(order[:, n : 2 * n])


def reference(order: Tensor, n: int, pool: Pool, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """The default persona on other questions, as often as any role."""

    def weights(asked: Tensor, others: Tensor) -> Tensor:
        prompt = torch.randint(pool.n_prompts, others.shape, generator=random)
        return _weights(prompt * pool.n_questions + others, asked, pool)

    a, b, c, d = order[:, : 4 * n].split(n, 1)
    return weights(a, b), weights(c, d)


def _weights(default_cells: Tensor, role_questions: Tensor, pool: Pool) -> Tensor:
    """Mean of the default cells minus mean of the roles on these questions, ``[N, C]``."""
    n_default = pool.n_prompts * pool.n_questions
    w = torch.zeros(len(default_cells), n_default + pool.n_questions)
    w.scatter_(1, default_cells, 1 / default_cells.shape[1])
    return w.scatter_(1, n_default + role_questions, -1 / role_questions.shape[1])


def curves(pool: Pool, gram: Tensor, questions: Tensor, samples: int, seed: int) -> list[dict[int, Tensor]]:
    """For both designs, rollouts -> reliability per layer ``[L]``, from these questions alone."""
    random = torch.Generator().manual_seed(seed)
    used = torch.cat([p * pool.n_questions + questions for p in range(pool.n_prompts + 1)])
    part = gram[:, used[:, None], used]
    found: list[dict[int, Tensor]] = []
    for design, share, extra in ((ours, 2, pool.n_prompts), (reference, 4, 1)):
        curve = {}
        for n in [n for n in SIZES if share * n <= len(questions)]:
            order = questions[torch.rand(samples, len(questions), generator=random).argsort(1)]
            a, b = (w[:, used] for w in design(order, n, pool, random))
            curve[n * (pool.n_roles + extra)] = _cosines(part, a, b).mean(1)
        found.append(curve)
    return found


def _cosines(gram: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``[L, N]`` cosines of the axes with these weights."""
    ga, gb = a @ gram, b @ gram  # [L, N, C]
    return (ga * b).sum(-1) / ((ga * a).sum(-1) * (gb * b).sum(-1)).sqrt()


def at(curve: dict[int, Tensor], layer: int | None) -> dict[int, float]:
    """One layer's reliabilities, or the mean over all of the pool's layers."""
    return {n: float(r.mean() if layer is None else r[layer]) for n, r in curve.items()}


def ratio_at_equal(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float, bool]:
    """The reference's largest budget over ours at equal reliability, and whether ours had to be extrapolated."""
    budget = max(theirs)
    x, wanted = _logit(np.array(list(ours.values()))), _logit(np.array(theirs[budget]))
    x, log_n = np.maximum.accumulate(x), np.log(list(ours))
    outside = min(0.0, wanted - x[0]) + max(0.0, wanted - x[-1])  # slope 1 beyond the ends
    equal = float(np.interp(wanted, x, log_n) + outside)
    return float(budget / np.exp(equal)), bool(outside)


def _logit(r: np.ndarray) -> np.ndarray:
    return np.log(np.clip(r, 1e-3, 1 - 1e-6) / (1 - np.clip(r, 1e-3, 1 - 1e-6)))


if __name__ == "__main__":
    alone(run)
