"""From a finished run of a tiny model to a policy: what is written, what it rests on, and what a resume does."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from persona_axis.collect.judging import read_exchanges
from persona_axis.collect.plan import DEFAULT
from persona_axis.collect.rundir import RunDir
from persona_axis.collect.verdicts import Exchange
from persona_axis.errors import CatalogError, UsageError
from persona_axis.geometry.axis import Axis
from persona_axis.model.loading import ChatModel
from persona_axis.pipeline import calibrate
from persona_axis.settings import CalibrationSettings
from persona_axis.steering import calibration
from persona_axis.steering.policy import Policy
from persona_axis.study import calibrate as calibrate_module
from persona_axis.study.calibrate import Calibration, candidates, own_neutral
from persona_axis.study.half import HalfFit, fit_half, halves
from persona_axis.study.measures import Measures

SMALL: dict[str, Any] = {
    "device": "cpu",
    "layers": (0, 1, 2, 3),
    "widths": (2,),
    "percentiles": (25, 75),
    "prompts": 20,
    "neutral_replies": 9,
}

Copy = Callable[[], Path]


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model's replies are hardly ever likely without their prompt."""
    monkeypatch.setattr(calibration, "NEUTRAL_PERPLEXITY", 1e6)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What models were asked to do, and on how much."""
    asked: list[tuple[str, int]] = []
    for name in ("replies", "neutral"):
        whole = getattr(Measures, name)

        def counted(self: Any, policy: Any, on: Any, name: str = name, whole: Any = whole) -> Any:
            asked.append((name, len(on)))
            return whole(self, policy, on)

        monkeypatch.setattr(Measures, name, counted)
    return asked


@pytest.fixture
def found(copied_run: Copy, lenient: None, one_load: list[Any]) -> Calibration:
    return calibrate(copied_run(), **SMALL)


def saved(folder: Path) -> dict[str, Any]:
    text = (folder / "calibration" / "calibration.json").read_text()
    return dict(json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")))


# ---- what is written ---------------------------------------------------------------------------------------------


def test_windows_lie_from_a_third_of_the_depth_on(found: Calibration, halvable_run: Path) -> None:
    axis = Axis.load(halvable_run)
    fitted = HalfFit(axis.vectors, torch.zeros(4, len(axis.layers)), 4, 0, [], "none")
    tried = {c.layers for c in candidates(axis, fitted, CalibrationSettings(widths=(2,)), 4)}
    assert tried == {(2, 3)}
    assert len({c.layers for c in candidates(axis, fitted, CalibrationSettings(layers=(0, 1, 2), widths=(2,)), 4)}) == 2


def test_the_record_says_everything(found: Calibration) -> None:
    run = found.path.parent
    record = saved(run)
    assert record == found.record
    assert len(record["candidates"]) == 6  # windows 0-1, 1-2, 2-3 at two percentiles
    for c in record["candidates"]:
        assert c["percentile_paper"] == 100 - c["percentile_assistant"]
        assert len(c["floors"]) == len(c["layers"]) == 2
        assert c["fluent"] == (c["fluency"]["objections"] == [])
        for outcome in filter(None, (c, c["held_out"])):
            intervals = [outcome["pressure"]["reduction"], outcome["capability"]["perplexity_ratio"]]
            intervals += [outcome["capability"][name] for name in ("top1_agreement", "mean_kl")]
            for i in intervals:
                assert i["low"] <= i["value"] <= i["high"]
    finalists = [c for c in record["candidates"] if c["held_out"]]
    assert [c["pressure"]["prompts"] for c in finalists] == [20] * 4
    assert [c["held_out"]["pressure"]["prompts"] for c in finalists] == [20] * 4
    assert {c["pressure"]["prompts"] for c in record["candidates"] if not c["held_out"]} == {9}
    assert any(c["front"] for c in finalists)
    assert not any(c["front"] for c in record["candidates"] if not c["held_out"])
    assert record["chosen"] in finalists
    assert "at most 1.015" in record["rule"]
    assert record["rounds"] == [
        {"candidates": 6, "prompts": 9, "neutral": 6},
        {"candidates": 4, "prompts": 20, "neutral": 9},
    ]
    assert (record["pressure"], record["positions"], record["max_perplexity"]) == ("likelihood", "all", 1.015)
    assert record["run"]["config_hash"] == RunDir.load(run).config_hash


def test_split_pool_and_floors_are_half_a_s(found: Calibration) -> None:
    folder = found.path.parent
    run, axis, record = RunDir.load(folder), Axis.load(folder), found.record
    a, b = halves(run.plan, axis.metadata["seed"])
    for name, half in (("A", a), ("B", b)):
        assert record["split"][name] == {"roles": list(half.roles), "blocks": sorted(half.blocks)}
    settings = calibrate_module.FitSettings("none", 4, "paired", None, axis.metadata["seed"])
    fitted = fit_half(run, a, "likelihood", "evidence", settings, axis.layers, axis.vectors.shape[1])
    pool = record["pool"]
    assert (pool["n"], pool["roles"], pool["default"], pool["traits"]) == (49, 28, 21, 0)
    assert (pool["scores"], pool["cross_fitted"]) == ("all", True)
    for percent, values in pool["percentiles"].items():
        np.testing.assert_allclose(values, np.percentile(fitted.pool.double(), int(percent), axis=0), rtol=1e-9)
    for c in record["candidates"]:
        own = pool["percentiles"][f"{c['percentile_assistant']:g}"]
        assert c["floors"] == pytest.approx([own[layer] for layer in c["layers"]], rel=1e-6)
    mine = Axis.load(found.path / "axis.safetensors")
    assert torch.equal(mine.vectors, fitted.axes)
    assert mine.content_hash == record["axis_hash"] != axis.content_hash
    assert mine.metadata["half"] == "A"


def test_the_policy_is_the_chosen_candidate(found: Calibration, chat: ChatModel) -> None:
    policy, chosen = Policy.load(found.path.parent), found.record["chosen"]
    assert list(policy.layers) == chosen["layers"]
    assert [float(i.lo[0]) for i in policy.interventions] == chosen["floors"]
    assert policy.content_hash == chosen["policy_hash"]
    assert all(float(i.hi[0]) == float("inf") for i in policy.interventions)
    for i in policy.interventions:  # toward the Assistant as half A sees it
        cosine = torch.nn.functional.cosine_similarity(i.V[0], found.axis.at(i.layer), dim=0)
        assert float(cosine) == pytest.approx(1, abs=1e-5)
    said = policy.provenance
    assert (said["percentile_assistant"], said["percentile_paper"]) == (
        chosen["percentile_assistant"],
        chosen["percentile_paper"],
    )
    assert said["calibration"]["held_out"] == chosen["held_out"]
    assert policy.model is not None
    assert (policy.model.name, policy.model.revision) == (chat.name, chat.revision)


def test_half_b_is_answered_by_finalists_only_and_chooses_nothing(
    copied_run: Copy, lenient: None, one_load: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures of half B turned upside down: other held-out figures, the same choice."""
    folders = copied_run(), copied_run()
    mine = calibrate(folders[0], **SMALL)
    a, b = halves(RunDir.load(folders[1]).plan, 0)
    whole, asked = Measures.replies, []

    def upside_down(self: Measures, policy: Policy, rows: Any) -> Any:
        asked.append((policy.content_hash, {row.persona for row in rows}))
        said = whole(self, policy, rows)
        if all(row.persona in b.roles for row in rows):
            return [type(f)(f.key, f.ids, f.pressure and -f.pressure, f.neutral_logprob) for f in said]
        return said

    monkeypatch.setattr(Measures, "replies", upside_down)
    other = calibrate(folders[1], **SMALL)
    assert mine.chosen == other.chosen is not None
    for m, o in zip(mine.record["candidates"], other.record["candidates"], strict=True):
        held = m.pop("held_out"), o.pop("held_out")
        assert m == o
        assert held[0] is None or held[0] != held[1]
    assert sum(personas <= set(b.roles) for _, personas in asked) == 4
    assert all(personas <= set(a.roles) or personas <= set(b.roles) for _, personas in asked)


def test_without_a_fluent_candidate_nothing_is_chosen(
    copied_run: Copy, one_load: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a policy that was chosen before goes: it is not this calibration's."""
    monkeypatch.setattr(calibration, "EMPTY_POINTS", -2)  # every reply would be too empty
    run = copied_run()
    Policy.at_percentile(Axis.load(run), [1], 50).save(run / "calibration" / "policy")
    found = calibrate(run, **SMALL)
    assert found.chosen is None
    record = saved(run)
    assert record["chosen"] is None
    assert not any(c["fluent"] for c in record["candidates"])
    assert not (run / "calibration" / "policy").exists()


# ---- resuming ----------------------------------------------------------------------------------------------------


def test_a_second_time_measures_nothing_and_writes_the_same(
    found: Calibration, measured: list[tuple[str, int]]
) -> None:
    run = found.path.parent
    before = (found.path / "calibration.json").read_bytes()
    calibrate(run, **SMALL)
    assert not measured
    assert (found.path / "calibration.json").read_bytes() == before
    more = calibrate(run, **{**SMALL, "prompts": 24})
    assert [n for what, n in measured if what == "replies"] == [4] * 8  # of each finalist on both halves
    assert not [n for what, n in measured if what == "neutral"]
    assert {c["pressure"]["prompts"] for c in more.record["candidates"]} == {9, 24}


def test_fewer_candidates_measure_only_what_is_new(found: Calibration, measured: list[tuple[str, int]]) -> None:
    """Three candidates all reach the last round: what each lacked there, and on half B."""
    three = [c for c in found.outcomes if c.percentile == 75]
    other = calibrate(found.path.parent, **{**SMALL, "percentiles": (75,)})
    assert list(other.finalists) == three
    lacking = sum(20 - found.outcomes[c].prompts + 20 * (c not in found.finalists) for c in three)
    assert sum(n for what, n in measured if what == "replies") == lacking > 0
    for c in three:
        if c in found.finalists:
            assert other.outcomes[c].reduction == found.outcomes[c].reduction
    measured.clear()
    calibrate(found.path.parent, **{**SMALL, "percentiles": (75,), "positions": "decode"})
    assert sum(n for what, n in measured if what == "replies") == 3 * 40  # other policies


# ---- other measures, other neutral replies -----------------------------------------------------------------------


class Letters:
    """A made-up pressure: characters of the reply. Keeps which replies it was asked about."""

    name = "letters"

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, exchanges: Sequence[Exchange]) -> dict[str, float]:
        self.calls.append([e.key for e in exchanges])
        return {e.key: float(len(e.reply)) for e in exchanges}


def test_another_pressure(found: Calibration, one_load: list[Any]) -> None:
    run, letters = found.path.parent, Letters()
    other = calibrate(run, pressure=letters, **SMALL)
    assert other.record["pressure"] == "letters"
    assert len(list(found.path.glob("measured-A-*.journal"))) == 2  # apart from the likelihood judge's figures
    said = {e.key: e.reply for e in read_exchanges(RunDir.load(run)) if e.reply_ids}
    plain = [np.mean([len(said[key]) for key in keys if key in said]) for keys in letters.calls]
    for outcome in other.finalists.values():  # over the prompts that both sides answered
        assert any(outcome.plain_pressure == pytest.approx(mean) for mean in plain)
    letters.calls.clear()
    assert calibrate(run, pressure=letters, **SMALL).record == other.record
    assert not letters.calls
    assert calibrate(run, **SMALL).record == found.record


def test_a_pressure_without_a_name_is_refused(copied_run: Copy, one_load: list[Any]) -> None:
    for named in (None, "", "likelihood"):

        def unnamed(exchanges: Sequence[Exchange]) -> dict[str, float]:
            return {}

        if named is not None:
            unnamed.name = named  # type: ignore[attr-defined]
        with pytest.raises(UsageError, match="needs a name"):
            calibrate(copied_run(), pressure=unnamed, **SMALL)


def conversation(i: int, turns: int = 1) -> list[dict[str, str]]:
    return [
        m
        for t in range(turns)
        for m in ({"role": "user", "content": f"Hello {i}, {t}?"}, {"role": "assistant", "content": f"Hi {i + t}."})
    ]


def write_lines(path: Path, conversations: Sequence[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, conversations)))
    return path


def test_a_user_s_own_traffic_is_the_neutral_set(
    found: Calibration, tmp_path: Path, chat: ChatModel, measured: list[tuple[str, int]]
) -> None:
    file = write_lines(tmp_path / "traffic.jsonl", [conversation(i, 1 + i % 2) for i in range(7)])
    passages = own_neutral(chat, file)
    assert [len(p.spans) for p in passages] == [1, 2, 1, 2, 1, 2, 1]
    assert [chat.decode(list(p.token_ids[a:b])) for p in passages[:2] for a, b in p.spans] == [
        "Hi 0.",
        "Hi 1.",
        "Hi 2.",
    ]
    other = calibrate(found.path.parent, neutral=file, **SMALL)
    assert {c["capability"]["replies"] for c in other.record["candidates"]} == {4}  # every other one
    assert {c["held_out"]["capability"]["replies"] for c in other.record["candidates"] if c["held_out"]} == {3}
    ratio = other.record["candidates"][0]["capability"]["perplexity_ratio"]
    assert ratio != found.record["candidates"][0]["capability"]["perplexity_ratio"]
    # Fluency is still told from the run's own neutral replies.
    fluent = [f.record["candidates"][0]["fluency"]["neutral"] for f in (found, other)]
    assert fluent[0] == fluent[1]
    measured.clear()
    assert calibrate(found.path.parent, neutral=file, **SMALL).record == other.record
    assert not measured
    write_lines(file, [conversation(i + 50) for i in range(7)])
    calibrate(found.path.parent, neutral=file, **SMALL)
    assert measured  # other traffic under the same name


def test_a_folder_of_traffic(copied_run: Copy, one_load: list[Any], tmp_path: Path) -> None:
    folder = tmp_path / "traffic"
    folder.mkdir()
    for i in range(4):
        write_lines(folder / f"{i}.jsonl", [conversation(i)])
    found = calibrate(copied_run(), neutral=folder, **SMALL)
    assert {c["capability"]["replies"] for c in found.record["candidates"]} == {2}


@pytest.mark.parametrize(
    ("lines", "error", "words"),
    [
        ([conversation(0)], UsageError, "holds 1 conversations with an assistant turn"),
        ([[{"role": "user", "content": "Hm?"}]] * 3, UsageError, "holds 0 conversations"),
        ([{"messages": 3}], CatalogError, "traffic.jsonl"),
    ],
)
def test_traffic_that_says_nothing_is_refused(
    tmp_path: Path, chat: ChatModel, lines: list[Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        own_neutral(chat, write_lines(tmp_path / "traffic.jsonl", lines))


# ---- what the run must be ----------------------------------------------------------------------------------------


def test_the_model_is_the_run_s(copied_run: Copy, lenient: None, one_load: list[Any]) -> None:
    run = copied_run()
    calibrate(run, **SMALL)
    [(path, options)] = one_load
    assert (path, options) == (run, {"dtype": "float32", "device": "cpu"})


def test_neutral_replies_are_those_of_the_half(found: Calibration) -> None:
    plan = RunDir.load(found.path.parent).plan
    a, b = halves(plan, 0)
    keys: list[set[str]] = []
    for name in "AB":
        [journal] = found.path.glob(f"measured-{name}-*.journal")
        text = journal.read_bytes().decode("latin-1")
        keys.append({row.key for row in plan.rows if f'"{row.key}"' in text})
    assert not keys[0] & keys[1]
    for half, mine in ((a, keys[0]), (b, keys[1])):
        rows = [row for row in plan.rows if row.key in mine]
        assert all(half.holds(row) for row in rows)
        assert sum(row.persona == DEFAULT for row in rows) == 9
