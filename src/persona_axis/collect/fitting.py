"""From shards and verdicts to the fit: vectors, axis, persona space, ranking, and how sure each figure is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from persona_axis.collect.cells import Row, counts, layer_chunks, shard_cells
from persona_axis.collect.filters import Kind, apply_filter
from persona_axis.collect.means import cell_means, percentiles, projections
from persona_axis.collect.plan import DEFAULT
from persona_axis.collect.rundir import RunDir
from persona_axis.collect.stored import StoredLayers
from persona_axis.errors import FitError, UsageError
from persona_axis.files.arrays import write_arrays
from persona_axis.files.atomic import make_folder, write_json
from persona_axis.geometry import resampling
from persona_axis.geometry.axis import Axis, cosine
from persona_axis.geometry.crossfit import cross_fit, edge_distance
from persona_axis.geometry.fit import (
    AssistantPlace,
    DroppedRole,
    Fit,
    Interval,
    LayerFit,
    MapPoint,
    RankedRole,
)
from persona_axis.geometry.space import PersonaSpace
from persona_axis.geometry.vectors import check_connected, persona_vectors

Estimator = Literal["paired", "paper"]
ASSISTANT = "Assistant"
PLACES = 8  # principal components on which the Assistant's place is given


@dataclass(frozen=True, slots=True)
class FitSettings:
    """What the fit is asked to do."""

    filter: str = "auto"
    min_count: int = 10
    estimator: Estimator = "paired"
    layer: int | None = None  # None is the middle of the model
    seed: int = 0
    draws: int = resampling.DRAWS


@dataclass(frozen=True, eq=False)
class FitResult:
    """A fit with its vectors."""

    fit: Fit
    axis: Axis
    roles: list[str]
    role_vectors: Tensor  # [n_roles, n_captured, d_model] float32
    assistant_vector: Tensor  # [n_captured, d_model] float32


def fit_run(
    run: RunDir,
    judge_name: str | None,
    kind: Kind | None,
    threshold: float | None,
    settings: FitSettings,
    layers: tuple[int, ...],
    n_layers: int,
    d_model: int,
    metadata: dict[str, Any],
    on_layer: Callable[[], None] = lambda: None,
) -> FitResult:
    """Fit the axis of a run and write ``fit/``.

    Args:
        judge_name: whose verdicts decide the filter; None when nothing was judged.
        kind: what that judge gives.
        threshold: the likelihood null's 95th percentile.
        layers: the captured decoder blocks.
        metadata: recorded with the axis.

    Raises:
        FitError: too few roles or rollouts pass the filter.
        UsageError: unknown filter, or a layer that was not captured.
    """
    paired = settings.estimator == "paired"
    cells = list(shard_cells(run, judge_name, threshold))
    n_blocks = run.plan.n_blocks
    applied = apply_filter(cells, run.plan.personas, n_blocks, settings.filter, kind, settings.min_count, not paired)
    table = applied.table
    everyone = [Row(persona) for persona in run.plan.personas]
    weights, all_weights = counts(cells, table, n_blocks), counts(cells, everyone, n_blocks)
    if paired:
        check_connected(weights, [row.persona for row in table])
    layer = analysed_layer(settings.layer, layers, n_layers)
    worker = _LayerWork(table, weights, all_weights, paired, settings)
    vectors: list[Tensor] = []
    figures: list[LayerFit] = []
    place: dict[str, Any] = {}
    pool: list[Tensor] = []
    for chunk in layer_chunks(len(layers), len(table) + len(everyone), n_blocks, d_model):
        stored = StoredLayers(run, cells, chunk)
        means, all_means = cell_means(stored, [table, everyone], n_blocks)
        for number, kept, whole in zip(layers[chunk], means, all_means, strict=True):
            vectors.append(persona_vectors(weights, kept, paired))
            figures.append(worker.figures(number, kept, whole, vectors[-1]))
            if number == layer:
                place = worker.places(kept, vectors[-1])
            on_layer()
        pool.append(projections(stored, torch.stack([worker.axis(v) for v in vectors[chunk]])))
    result = _assemble(run, worker, torch.stack(vectors), figures, place, applied, layers, layer, settings, n_layers)
    metadata = {**metadata, "pool": percentiles(torch.cat(pool, 1))}
    result = FitResult(
        result.fit,
        Axis(result.axis.vectors, layers, layer, metadata),
        result.roles,
        result.role_vectors,
        result.assistant_vector,
    )
    write_fit(run, result, metadata)
    return result


def analysed_layer(wanted: int | None, layers: tuple[int, ...], n_layers: int) -> int:
    """The layer to analyse: the one asked for, else the captured one nearest the middle of the model."""
    if wanted is None:
        return min(layers, key=lambda layer: (abs(layer - n_layers // 2), layer))
    if wanted not in layers:
        raise UsageError(f"--layer {wanted} was not captured; captured are {', '.join(map(str, layers))}.")
    return wanted


class _LayerWork:
    """What is the same for every layer: weights, draws, folds."""

    def __init__(
        self, table: list[Row], weights: Tensor, all_weights: Tensor, paired: bool, settings: FitSettings
    ) -> None:
        self.table = table
        self.weights = weights
        self.all_weights = all_weights
        self.paired = paired
        self.seed = settings.seed
        self.in_axis = torch.tensor([float(row.in_axis) for row in table[1:]])
        self.in_space = torch.tensor([float(row.in_space) for row in table[1:]])
        n_blocks = weights.shape[1]
        self.folds = resampling.question_folds(n_blocks, settings.seed)
        roles = [row.persona for row in table[1:]]
        self.draws = resampling.Draws.make(n_blocks, roles, settings.seed, settings.draws)

    def axis(self, vectors: Tensor) -> Tensor:
        """``[P, d]`` -> ``[d]``."""
        return resampling.axes_of(vectors[None], self.in_axis[None])[0]

    def space(self, vectors: Tensor) -> PersonaSpace:
        return PersonaSpace.fit(vectors[1:][self.in_space > 0], vectors[0])

    def figures(self, layer: int, means: Tensor, all_means: Tensor, vectors: Tensor) -> LayerFit:
        axis, space = self.axis(vectors), self.space(vectors)
        cos = float(cosine(axis, space.components[0]))
        draws = resampling.cos_axis_pc1_draws(self.weights, means, self.in_axis, self.in_space, self.paired, self.draws)
        return LayerFit(
            layer=layer,
            cos_axis_pc1=resampling.interval(cos, draws),
            cos_axis_pc1_unfiltered=self._unfiltered(all_means),
            pc_shares=space.shares.tolist(),
            components_70=space.components_for(0.7),
            components_80=space.components_for(0.8),
            components_90=space.components_for(0.9),
            reliability=resampling.reliability(self.weights, means, self.in_axis, self.paired, self.seed),
            axis_norm=float(axis.norm()),
        )

    def _unfiltered(self, means: Tensor) -> float:
        vectors = persona_vectors(self.all_weights, means, self.paired)
        roles = vectors[1:][vectors[1:, 0].isfinite()]
        space = PersonaSpace.fit(roles, vectors[0])
        return float(cosine(vectors[0] - roles.mean(0), space.components[0]))

    def places(self, means: Tensor, vectors: Tensor) -> dict[str, Any]:
        """Where everyone lies at the analysed layer: held out with intervals, and in sample for the map."""
        args = (means, self.folds)
        held = cross_fit(self.weights[None], *args, self.in_axis[None], self.in_space[None], self.paired)
        projections, distances = resampling.cross_fit_draws(
            self.weights, *args, self.in_axis, self.in_space, self.paired, self.draws
        )
        centre = held.projection[0, 1:].nanmean()
        intervals = [
            resampling.interval(float(value), draws + centre)
            for value, draws in zip(held.projection[0], projections.T, strict=True)
        ]
        space = self.space(vectors)
        unit = self.axis(vectors) / self.axis(vectors).norm()
        coordinates = space.coordinates(vectors)
        roles = coordinates[1:][self.in_space > 0]
        return {
            "intervals": intervals,
            "edge": resampling.interval(float(held.edge_distance()[0]), distances),
            "edge_in_sample": float(edge_distance(coordinates[0, 0], roles[:, 0])),
            "coordinates": coordinates[:, :3].tolist(),
            "projections": (vectors @ unit).tolist(),
            "assistant": _assistant_places(coordinates[0], roles),
        }


def _assistant_places(assistant: Tensor, roles: Tensor) -> list[AssistantPlace]:
    """Distance of the Assistant from the nearer end of the roles' range, per component (in sample)."""
    high, low = roles.amax(0), roles.amin(0)
    nearer = torch.minimum(high - assistant, assistant - low) / (high - low)
    return [AssistantPlace(i + 1, value) for i, value in enumerate(nearer[:PLACES].tolist())]


def _assemble(
    run: RunDir,
    work: _LayerWork,
    vectors: Tensor,
    figures: list[LayerFit],
    place: dict[str, Any],
    applied: Any,
    layers: tuple[int, ...],
    layer: int,
    settings: FitSettings,
    n_layers: int,
) -> FitResult:
    table = work.table
    groups = {row.persona: row.group for row in run.plan.rows}
    kept, total = work.weights.sum(1).tolist(), _totals(run, work.all_weights)
    axes = torch.stack([work.axis(v) for v in vectors])
    main = [i for i, row in enumerate(table) if i > 0 and row.in_axis]
    if not vectors.isfinite().all():
        raise FitError("A persona vector is not finite: a role lost all its rollouts. Lower --min-count.")
    ranking = [
        RankedRole(
            table[i].persona,
            groups[table[i].persona],
            place["intervals"][i],
            int(kept[i]),
            total[table[i].persona],
        )
        for i in main
    ]
    points = [
        MapPoint(
            ASSISTANT if i == 0 else table[i].persona,
            groups[table[i].persona],
            place["coordinates"][i],
            place["projections"][i],
        )
        for i in [0, *main]
    ]
    best = max(figures, key=lambda f: f.reliability).layer
    fit = Fit(
        n_layers=n_layers,
        d_model=vectors.shape[-1],
        layers=list(layers),
        layer=layer,
        most_reliable_layer=best,
        estimator=settings.estimator,
        filter=applied.name,
        filter_note=applied.note,
        min_count=settings.min_count,
        assistant=place["intervals"][0],
        edge_distance=place["edge"],
        edge_distance_in_sample=place["edge_in_sample"],
        per_layer=figures,
        layer_cosine=cosine(axes[:, None], axes[None]).tolist(),
        ranking=sorted(ranking, key=lambda r: r.projection.value),
        dropped=applied.dropped,
        points=points,
        assistant_places=place["assistant"],
        bootstrap_draws=len(work.draws.questions),
    )
    roles = [table[i].persona for i in main]
    role_vectors = vectors[:, main].transpose(0, 1).contiguous()
    return FitResult(fit, Axis(axes, layers, layer), roles, role_vectors, vectors[:, 0].contiguous())


def _totals(run: RunDir, all_weights: Tensor) -> dict[str, int]:
    return {p: int(n) for p, n in zip(run.plan.personas, all_weights.sum(1).tolist(), strict=True)}


def write_fit(run: RunDir, result: FitResult, metadata: dict[str, Any]) -> None:
    """``axis.safetensors``, ``vectors.safetensors`` (roles in the order of ``fit.json``), ``fit.json``."""
    make_folder(run.fit)
    result.axis.save(run.fit / "axis.safetensors")
    write_arrays(
        run.fit / "vectors.safetensors",
        {"roles": result.role_vectors.numpy(), "assistant": result.assistant_vector.numpy()},
    )
    write_json(run.fit / "fit.json", {**asdict(result.fit), "vector_roles": result.roles, "metadata": metadata})


def read_fit(data: dict[str, Any]) -> Fit:
    """A :class:`Fit` from the content of ``fit.json``."""
    d = {k: v for k, v in data.items() if k not in ("vector_roles", "metadata")}

    def between(x: dict[str, float]) -> Interval:
        return Interval(**x)

    d["assistant"], d["edge_distance"] = between(d["assistant"]), between(d["edge_distance"])
    d["per_layer"] = [LayerFit(**{**f, "cos_axis_pc1": between(f["cos_axis_pc1"])}) for f in d["per_layer"]]
    d["ranking"] = [RankedRole(**{**r, "projection": between(r["projection"])}) for r in d["ranking"]]
    d["dropped"] = [DroppedRole(**r) for r in d["dropped"]]
    d["points"] = [MapPoint(**p) for p in d["points"]]
    d["assistant_places"] = [AssistantPlace(**p) for p in d["assistant_places"]]
    return Fit(**d)


__all__ = ["ASSISTANT", "DEFAULT", "FitResult", "FitSettings", "fit_run", "read_fit", "write_fit"]
