"""The card of a shared artifact: what it is, how it was made, how sure its figures are, how to use it.

Every figure comes from the files that are shared, or from the plan and settings of the run beside them. What the files
do not say is left out. The same files give the same card.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from persona_axis.collect.fitting import read_fit
from persona_axis.collect.plan import DEFAULT, Plan
from persona_axis.errors import StorageError
from persona_axis.files.atomic import read_json
from persona_axis.geometry.fit import Fit, Interval
from persona_axis.hub.artifact import CALIBRATION, FIT, SUMMARY, Artifact
from persona_axis.model.identity import COMMIT, EMBEDDED_NAME, HUB_ID
from persona_axis.report.words import (
    count,
    findings_of_fit,
    magnitude,
    number,
    signed_percent_interval,
    verdict,
    with_interval,
)
from persona_axis.settings import EMBEDDED
from persona_axis.steering.policy import Policy, layer_span

PAPER = "https://arxiv.org/abs/2601.10387"


def model_card(artifact: Artifact, repo_id: str) -> str:
    """The text of ``README.md``.

    Raises:
        StorageError: a fit or a plan of another version, or damaged.
    """
    card = _Card(artifact, repo_id)
    blocks = [card.header(), card.what(), card.axis(), card.policy(), card.use(), card.limits(), card.paper()]
    return "\n\n".join(block for block in blocks if block) + "\n"


def subject(artifact: Artifact) -> str:
    """What is shared, in a few words."""
    parts = [name for name, part in (("axis", artifact.axis), ("policy", artifact.policy)) if part is not None]
    model = _recorded_model(artifact)[0]
    return f"the {' and '.join(parts)}" + (f" of {model}" if model else "")


def _recorded_model(artifact: Artifact) -> tuple[str, str]:
    """Name and revision as recorded; "" for what is not."""
    if artifact.axis is not None:
        known = artifact.axis.metadata
        return str(known.get("model") or ""), str(known.get("revision") or "")
    identity = artifact.policy.model if artifact.policy is not None else None
    return (identity.name, identity.revision) if identity is not None else ("", "")


class _Card:
    def __init__(self, artifact: Artifact, repo_id: str) -> None:
        self.artifact = artifact
        self.repo_id = repo_id
        self.model, self.revision = _recorded_model(artifact)
        embedded = EMBEDDED_NAME.fullmatch(self.model)
        self.embedded = embedded is not None
        self.base_model = embedded["id"] if embedded else self.model if HUB_ID.fullmatch(self.model) else ""
        self.spoken_model = self.model or "a model that the files do not name"
        self.folder = repo_id.rpartition("/")[2]

    def header(self) -> str:
        tags = ["assistant-axis", "persona", "interpretability", "activation-steering"]
        tags += ["activation-capping"] if self.artifact.policy is not None else []
        lines = ["---", "library_name: persona-axis", "tags:", *(f"- {tag}" for tag in tags)]
        if self.base_model:
            lines += [f"base_model: {json.dumps(self.base_model)}", "base_model_relation: adapter"]
        return "\n".join([*lines, "---"])

    def what(self) -> str:
        if self.artifact.axis is None:
            return (
                f"# A persona policy for {self.spoken_model}\n\n"
                "Which changes of the residual stream to hold this model with while it runs. It contains no model "
                f"weights. Made with persona-axis, after Lu et al., [The Assistant Axis]({PAPER})."
            )
        held = "" if self.artifact.policy is None else " With it comes a policy that holds the model on the axis."
        return (
            f"# Assistant Axis of {self.spoken_model}\n\n"
            "The direction in this model's residual stream that tells how much it is its default character, the "
            "Assistant: per decoder block, the mean activation of the Assistant's replies minus the mean over role "
            f"vectors. A higher projection is more like the Assistant.{held} It contains no model weights. Made with "
            f"persona-axis, after Lu et al., [The Assistant Axis]({PAPER})."
        )

    # ---- the axis ------------------------------------------------------------------------------------------------

    def axis(self) -> str:
        axis = self.artifact.axis
        if axis is None:
            return ""
        fit, summary = self._fit(), self.artifact.json(SUMMARY)
        rows = [("model", self._model_line(summary)), ("layers", layer_span(axis.layers, "-"))]
        rows += [("analysed layer", f"{axis.layer}, counted from 0 (outputs of decoder blocks)")]
        rows += self._collected(fit, summary)
        if fit is not None:
            rows += _fitted(fit, summary)
        elif axis.metadata.get("estimator"):
            rows.append(("estimator", str(axis.metadata["estimator"])))
        said = "\n\n" + verdict(findings_of_fit(fit)) if fit is not None else ""
        return f"## How the axis was made{said}\n\n{_bullets(rows)}"

    def _model_line(self, summary: Mapping[str, Any]) -> str:
        size = [f"{summary['n_layers']} layers"] if summary.get("n_layers") else []
        size += [f"width {summary['d_model']}"] if summary.get("d_model") else []
        size += [str(summary["dtype"])] if summary.get("dtype") else []
        revision = f", revision `{self.revision}`" if self.revision else ""
        return self.spoken_model + revision + (f" ({', '.join(size)})" if size else "")

    def _collected(self, fit: Fit | None, summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Who answered what, and how it was judged."""
        if fit is not None:
            left_out = f"; {len(fit.dropped)} more left out for too few replies" if fit.dropped else ""
            yield "roles", f"{len(fit.ranking)} in the axis{left_out}"
        plan = self.artifact.folder / "plan.parquet"
        if plan.is_file():
            rows = Plan.read(plan).rows
            prompts = {row.prompt_index for row in rows if row.persona == DEFAULT}
            questions = len({row.question_index for row in rows})
            yield "questions", f"{questions}; the default persona answered under {len(prompts)} neutral prompts"
        if summary.get("rollouts") is not None:
            yield "rollouts", count(summary["rollouts"]) + self._sampling()
        judge = summary.get("judge") or {}
        if judge.get("name"):
            known = [key for key in ("kept", "dropped", "failed") if judge.get(key) is not None]
            counts = ", ".join(f"{count(judge[key])} {key}" for key in known)
            yield "judge", f"{judge['name']}; role rollouts: {counts}"
        elif self.artifact.axis is not None and self.artifact.axis.metadata.get("judge"):
            yield "judge", str(self.artifact.axis.metadata["judge"])

    def _sampling(self) -> str:
        file = self.artifact.folder / "run.json"
        run = read_json(file) if file.is_file() else {}
        known = run.get("generation", {})
        words = (("max_tokens", "at most {} tokens each"), ("temperature", "temperature {}"), ("top_p", "top-p {}"))
        said = [form.format(known[key]) for key, form in words if known.get(key) is not None]
        return f" ({', '.join(said)})" if said else ""

    def _fit(self) -> Fit | None:
        data = self.artifact.json(FIT)
        if not data:
            return None
        try:
            return read_fit(data)
        except (KeyError, TypeError) as e:
            raise StorageError(
                f"{self.artifact.folder / FIT} was written by another version ({e}). Run persona-axis run again on the "
                "folder: it fits anew from what is there."
            ) from e

    # ---- the policy ----------------------------------------------------------------------------------------------

    def policy(self) -> str:
        policy = self.artifact.policy
        if policy is None:
            return ""
        found = _Calibration.of(policy, self.artifact.json(CALIBRATION))
        rows = [
            ("kind", str(policy.provenance.get("kind") or "")),
            ("layers", layer_span(policy.layers, "-")),
            ("tokens", f"positions `{policy.positions}`"),
            ("floors", _percentiles(policy.provenance)),
            ("pool", found.pool(policy)),
            ("rule of the choice", found.rule),
        ]
        blocks = ["## The policy", _bullets([(name, text) for name, text in rows if text]), _bounds(policy)]
        if figures := list(found.figures()):
            said = "Measured on the half of the questions and roles that had no part in fitting or choosing"
            blocks += [f"{said} (95 % intervals):", _bullets(figures)]
        return "\n\n".join(blocks)

    # ---- use, limits ---------------------------------------------------------------------------------------------

    def use(self) -> str:
        shell = [f"persona-axis pull {self.repo_id} --out {self.folder}"]
        if self.artifact.axis is not None:
            shell.append(f"persona-axis read conversation.json --axis {self.folder} --model {self._load_name()}")
        return (
            "## How to use it\n\n"
            + "\n".join(["```shell", *shell, "```"])
            + "\n\n"
            + "\n".join(["```python", *self._python(), "```"])
        )

    def _python(self) -> Iterator[str]:
        has_axis, has_policy = self.artifact.axis is not None, self.artifact.policy is not None
        names = ["Axis"] * has_axis + ["Policy", "cap"] * has_policy + ["load_model"]
        names += ["read_conversation"] * has_axis
        yield f"from persona_axis import {', '.join(names)}"
        yield "from persona_axis.hub.pull import pull"
        yield ""
        pinned = not self.embedded and self.base_model and COMMIT.fullmatch(self.revision)
        revision = f", revision={json.dumps(self.revision)}" if pinned else ""
        yield f'folder = pull("{self.repo_id}", "{self.folder}")'
        yield f"chat = load_model({json.dumps(self._load_name())}{revision})"
        if has_axis:
            yield "axis = Axis.load(folder)"
            yield 'asked = {"role": "user", "content": "Who are you?"}'
            yield 'said = {"role": "assistant", "content": "I am the wind."}'
            yield "for turn in read_conversation(chat, [asked, said], [axis.layer]):"
            yield "    print(turn.role, float(axis.project(turn.activation[0])))  # higher = more like the Assistant"
        if has_policy:
            yield "with cap(chat, Policy.load(folder)):"
            yield '    print(chat.reply("Who are you?"))'

    def _load_name(self) -> str:
        """The model as ``load_model`` takes it; a local one is known by its folder's name only."""
        return EMBEDDED if self.embedded else self.model or "MODEL"

    def limits(self) -> str:
        lines = [
            "It belongs to this model at this revision. On another checkpoint, another quantisation or another chat "
            "template its figures do not hold.",
            "A projection says how the model presents itself, not whether what it says is right or harmless.",
        ]
        if self.artifact.axis is not None:
            lines.append(
                "Intervals are over questions and roles of this run; another judge or other texts give another axis."
            )
        if self.artifact.policy is not None:
            lines.append(
                "A held model still has every ability it had. The policy bounds the projection in its layers and "
                "promises nothing else; measure your own task with and without it."
            )
        return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)

    def paper(self) -> str:
        return (
            "## Paper\n\nLu, Gallagher, Michala, Fish and Lindsey (2026): The Assistant Axis. "
            f"[arXiv 2601.10387]({PAPER})"
        )


# ---- lines -------------------------------------------------------------------------------------------------------


def _fitted(fit: Fit, summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the fit is, and how sure."""
    at = fit.at_layer()
    note = f" ({fit.filter_note})" if fit.filter_note else ""
    yield "filter", f"{fit.filter}{note}, at least {fit.min_count} kept rollouts per role"
    seed = f", seed {summary['seed']}" if summary.get("seed") is not None else ""
    yield "estimator", fit.estimator + seed
    yield "reliability", f"{number(at.reliability)}: the cosine expected with the axis of as many other questions"
    yield (
        "|cos(axis, PC1)|",
        f"{with_interval(magnitude(at.cos_axis_pc1))} (95 % interval, {count(fit.bootstrap_draws)} bootstrap draws)",
    )
    if summary.get("catalog_hash"):
        yield "catalog", f"`{summary['catalog_hash']}`"


def _percentiles(known: Mapping[str, Any]) -> str:
    """Both conventions, always together."""
    paper, assistant = known.get("percentile_paper"), known.get("percentile_assistant")
    if paper is None or assistant is None:
        return ""
    return (
        f"percentile {assistant:g} toward the Assistant of the pool's projections. The paper calls it "
        f"p{paper / 100:g}: it counts along the negated axis and clamps from above"
    )


@dataclass(frozen=True)
class _Calibration:
    """What a calibration says of this very policy; empty when it says nothing."""

    record: dict[str, Any]  # calibration.json, when the policy is the one it chose
    rule: str
    held_out: dict[str, Any]

    @classmethod
    def of(cls, policy: Policy, record: dict[str, Any]) -> _Calibration:
        chosen = record.get("chosen")
        if not isinstance(chosen, dict) or chosen.get("policy_hash") != policy.content_hash:
            record, chosen = {}, {}
        known = policy.provenance.get("calibration") or {"rule": record.get("rule"), "held_out": chosen.get("held_out")}
        return cls(record, str(known.get("rule") or ""), dict(known.get("held_out") or {}))

    def pool(self, policy: Policy) -> str:
        pool = self.record.get("pool") or {}
        if "n" in pool:
            parts = [f"{count(pool[key])} of {word}" for key, word in _POOL.items() if pool.get(key)]
            fitted = ", each projected on an axis fitted without it" if pool.get("cross_fitted") else ""
            return f"{count(pool['n'])} replies ({', '.join(parts)}){fitted}"
        n = policy.provenance.get("pool")
        return f"{count(n)} replies" if isinstance(n, int) else ""

    def figures(self) -> Iterator[tuple[str, str]]:
        pressure, price = (dict(self.held_out.get(key) or {}) for key in ("pressure", "capability"))
        if reduction := _interval(pressure.get("reduction")):
            known = [f"{number(pressure[k], 3)} {k}" for k in ("plain", "held") if pressure.get(k) is not None]
            known += [f"{count(pressure['prompts'])} role prompts"] if pressure.get("prompts") is not None else []
            yield "pressure toward roles reduced by", f"{signed_percent_interval(reduction)} ({', '.join(known)})"
        replies = f" ({count(price['replies'])} neutral replies)" if price.get("replies") is not None else ""
        for key, name in _PRICES.items():
            if figure := _interval(price.get(key)):
                yield name, with_interval(figure, 4) + replies
        if "fluent" in self.held_out:
            yield "replies under role prompts fluent", "yes" if self.held_out["fluent"] else "no"


_POOL = {"roles": "roles", "traits": "traits", "default": "the default persona"}
_PRICES = {
    "perplexity_ratio": "perplexity, held over plain",
    "top1_agreement": "share of tokens with the same likeliest token",
    "mean_kl": "mean KL divergence from the plain model, nats",
}


def _interval(data: Any) -> Interval | None:
    if not isinstance(data, dict) or not data.keys() >= {"value", "low", "high"}:
        return None
    value, low, high = (math.nan if data[key] is None else float(data[key]) for key in ("value", "low", "high"))
    return Interval(value, low, high)


def _bounds(policy: Policy) -> str:
    """A row per layer; a column only where some layer has a value."""
    columns = {
        "floor": [_numbers(part.lo.flatten().tolist()) for part in policy.interventions],
        "ceiling": [_numbers(part.hi.flatten().tolist()) for part in policy.interventions],
        "shift": [_numbers([x or math.inf for x in part.shift.flatten().tolist()]) for part in policy.interventions],
    }
    columns = {name: column for name, column in columns.items() if any(column)}
    names = ["layer", *columns]
    rows = zip(map(str, policy.layers), *columns.values(), strict=True)
    table = [f"| {' | '.join(cells)} |" for cells in (names, ["---:"] * len(names), *rows)]
    return "Bounds of the projection, in residual-stream units:\n\n" + "\n".join(table)


def _numbers(values: list[float]) -> str:
    """Empty when there is no bound."""
    return ", ".join(number(x) for x in values if math.isfinite(x))


def _bullets(rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"- **{name}**: {text}" for name, text in rows)
