"""The rollouts that ``sample_efficiency`` draws its samples from: ``runs/bench/pool``, resumed like any run.

Every role answers every question once (its prompts rotating), the default persona every question under every default
prompt. All rollouts count: no judge, no filter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import ROOT
from persona_axis.collect.plan import DEFAULT
from persona_axis.collect.rollouts import generate_rollouts
from persona_axis.collect.rundir import RunDir, shard_name
from persona_axis.files.shards import open_arrays, read_rows
from persona_axis.model.engine import Sampling
from persona_axis.model.loading import load_model
from persona_axis.model.selfcheck import choose_engine
from persona_axis.pipeline import default_batch_tokens, plan_of
from persona_axis.settings import RunSettings

FOLDER = ROOT / "runs" / "bench"


@dataclass(frozen=True, eq=False)
class Pool:
    """Activations of the middle half of the layers.

    Attributes:
        default: ``[L, prompts, questions, d]``, one rollout each.
        roles: ``[L, questions, d]``, mean over the roles.
        layers: the L layers' numbers.
    """

    default: Tensor
    roles: Tensor
    layers: list[int]
    n_roles: int
    middle: int  # the middle layer's place among them
    rollouts: int
    without_activation: int

    @property
    def n_prompts(self) -> int:
        return self.default.shape[1]

    @property
    def n_questions(self) -> int:
        return self.default.shape[2]


def make_pool(roles: int, questions: int, tokens: int, name: str) -> Pool:
    """Generate what is missing, then read."""
    settings = RunSettings(out=FOLDER / name, roles=str(roles), questions=str(questions), max_tokens=tokens)
    plan, catalog_hash = plan_of(settings)
    run = RunDir.open(settings.out, settings.generation(), plan, catalog_hash)
    if not all(run.has_rollouts(shard) for shard in range(plan.n_shards)):
        _generate(run, settings)
    return _read(run)


def _generate(run: RunDir, settings: RunSettings) -> None:
    chat = load_model(settings.model, dtype=settings.dtype, device=settings.device)
    engine = choose_engine(chat, settings.layers, default_batch_tokens(chat)).engine
    sampling = Sampling(settings.max_tokens, settings.temperature, settings.top_p, settings.seed)
    generate_rollouts(run, chat, engine, sampling)


def _read(run: RunDir) -> Pool:
    """Default cells by prompt and question, role sums by question, shard by shard."""
    rows = run.plan.rows
    n_prompts = 1 + max(r.prompt_index for r in rows if r.persona == DEFAULT)
    n_questions = 1 + max(r.question_index for r in rows)
    n_layers, d = _width(run.rollouts, run)
    middle_half = slice(n_layers // 4, n_layers - n_layers // 4)
    layers = list(range(n_layers))[middle_half]
    cells = torch.full((n_prompts, n_questions, len(layers), d), torch.nan)
    sums, counts = torch.zeros(n_questions, len(layers), d), torch.zeros(n_questions)
    lost = 0
    for shard, mine in run.plan.shards():
        counted = read_rows(run.rollouts, shard_name(shard), ["n_counted"]).column(0).to_pylist()
        with open_arrays(run.rollouts, shard_name(shard)) as arrays:
            values = torch.from_numpy(arrays.read("activations", second=middle_half))
        for row, n, value in zip(mine, counted, values, strict=True):
            lost += n == 0
            if n > 0 and row.persona == DEFAULT:
                cells[row.prompt_index, row.question_index] = value
            elif n > 0:
                sums[row.question_index] += value
                counts[row.question_index] += 1
    filled = torch.where(cells.isnan(), cells.nanmean(0, keepdim=True), cells)  # an empty reply: its question's mean
    return Pool(
        default=filled.permute(2, 0, 1, 3).contiguous(),
        roles=(sums / counts[:, None, None]).transpose(0, 1).contiguous(),
        layers=layers,
        n_roles=len(run.plan.personas) - 1,
        middle=layers.index(n_layers // 2),
        rollouts=len(rows),
        without_activation=lost,
    )


def _width(folder: Path, run: RunDir) -> tuple[int, int]:
    with open_arrays(folder, shard_name(0)) as arrays:
        _, n_layers, d = arrays.shape("activations")
    return n_layers, d
