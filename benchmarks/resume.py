"""Resume and memory, on a tiny random model: nothing here is timed.

    python -m benchmarks --only resume

Claims: a resumed run reads no finished shard twice (the run folder's own count of reads, after generation was broken
off half-way; over resumed generation alone, and over it and the fit together); peak memory is flat in the number of
rollouts (at most 1.05 times from N to 4N rollouts of 48 kB of activations, generation and fit each in a process of
its own, three times). More rollouts come from more prompts to the same questions: tables by question do not grow.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.machine import peak_of
from benchmarks.measure import Claim, Ratio, Result, Work, alone
from persona_axis.catalog.catalog import Question, Role
from persona_axis.collect.fitting import FitSettings, fit_run
from persona_axis.collect.plan import Plan, make_plan
from persona_axis.collect.rollouts import generate_rollouts
from persona_axis.collect.rundir import RunDir
from persona_axis.model.decode import DecodingLoop
from persona_axis.model.engine import OnTokens, Reply, Request, Sampling, nobody
from persona_axis.model.loading import ChatModel, wrap_model

TOKENS, LAYERS, WIDTH, ROLES, QUESTIONS = 4, 24, 512, 8, 32
READS = "resume reads no finished shard twice"
GENERATION_READS = Claim("resume, reads by generation", READS, 0, "reads of the most read file", at_most=True)
ALL_READS = Claim("resume, reads by generation and fit", READS, 1, "reads of the most read file", at_most=True)
FLAT = "memory flat in the number of rollouts"


def run(quick: bool = False) -> Iterator[Result]:
    yield from reads()
    prompts, repeats = (1, 1) if quick else (3, 3)
    for stage in ("generation", "fit"):
        claim = Claim(f"memory of {stage}", FLAT, 1.05, "x peak memory at a quarter", at_most=True)
        yield memory(claim, stage, prompts, repeats)


def reads() -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as folder:
        run, total = opened(folder, 3), len(plan_of(3).rows)
        generate(run, stop_after=total // 2)
        run = opened(folder, 3)
        finished = sum(run.has_rollouts(shard) for shard in range(run.plan.n_shards))
        generate(run)
        settings = {"rollouts": total, "shards": run.plan.n_shards, "finished_before_resume": finished}
        yield Result(GENERATION_READS, Ratio.exact(_most(run)), settings)
        fit(run)
        by_kind = {suffix: _most(run, suffix) for suffix in (".parquet", ".safetensors")}
        yield Result(ALL_READS, Ratio.exact(_most(run)), settings, {"most_reads_of_a_file": by_kind})


def _most(run: RunDir, suffix: str = "") -> int:
    return max((n for path, n in run.log.counts.items() if path.name.endswith(suffix)), default=0)


def memory(claim: Claim, stage: str, prompts: int, repeats: int) -> Result:
    peaks = [{n: _peak(stage, n) for n in (prompts, 4 * prompts)} for _ in range(repeats)]
    small, large = (len(plan_of(n).rows) for n in (prompts, 4 * prompts))
    added = (large - small) * LAYERS * WIDTH * 4
    growth = [p[4 * prompts] - p[prompts] for p in peaks]
    ratios = [p[4 * prompts] / p[prompts] for p in peaks]
    settings = {"rollouts": [small, large], "layers": LAYERS, "d_model": WIDTH}
    details = {
        "peak_bytes": [list(p.values()) for p in peaks],
        "growth_over_added_activations": [g / added for g in growth],
    }
    return Result(claim, Ratio.of(ratios), settings, details)


def _peak(stage: str, prompts: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        if stage == "fit":
            generate(opened(folder, prompts))
        return peak_of(f"benchmarks.resume:prepared_{stage}", folder=folder, prompts=prompts)["peak"]


def prepared_generation(folder: str, prompts: int) -> Work:
    tiny()
    return lambda: generate(opened(folder, prompts))


def prepared_fit(folder: str, prompts: int) -> Work:
    return lambda: fit(opened(folder, prompts))


class BreaksOff:
    """An engine that gives so many replies and no more, as a kill would."""

    name = "breaks off"

    def __init__(self, engine: DecodingLoop, replies: int) -> None:
        self.engine, self.replies, self.layers = engine, replies, engine.layers

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, on_tokens: OnTokens = nobody
    ) -> Iterator[Reply]:
        yield from islice(self.engine.generate(requests, sampling, on_tokens), self.replies)


def generate(run: RunDir, stop_after: int | None = None) -> None:
    engine: Any = DecodingLoop(tiny(), tuple(range(LAYERS)), batch_tokens=64 * 64)
    if stop_after is not None:
        engine = BreaksOff(engine, stop_after)
    generate_rollouts(run, tiny(), engine, Sampling(TOKENS))


def fit(run: RunDir) -> None:
    layers = tuple(range(LAYERS))
    fit_run(run, None, None, None, FitSettings(filter="none", draws=50), layers, LAYERS, WIDTH, {})


def opened(folder: str, prompts: int) -> RunDir:
    return RunDir.open(Path(folder) / "run", {"model": "tiny", "prompts": prompts}, plan_of(prompts))


def plan_of(prompts: int) -> Plan:
    """Eight roles and the default persona, 32 short questions, each under ``prompts`` prompts."""
    names = [f"role_{i}" for i in range(ROLES)]
    roles = [Role(n, "g", n, tuple(f"Be {n} {p}." for p in range(prompts)), (), "") for n in names]
    questions = [Question(f"q{i}", "c", f"Why {i}?") for i in range(QUESTIONS)]
    return make_plan(roles, questions, [f"Help {p}." for p in range(prompts)], design="crossed")


@cache
def tiny() -> ChatModel:
    """A random Llama whose activations are large and whose matrices are small."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.conftest import tiny_tokenizer

    config = LlamaConfig(
        vocab_size=280,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return wrap_model(model, tiny_tokenizer(), name="tiny")


if __name__ == "__main__":
    alone(run)
