"""The checks of ``benchmarks/vllm_gpu.py`` on what engines might say: they hold when all is right, and each notices
what it is for. The engines themselves need a GPU."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import vllm_gpu
from benchmarks.vllm_child import ChildFailed
from benchmarks.vllm_gpu import Asked, exit_code, finite, judged, table
from benchmarks.vllm_gpu_checks import (
    CONTRAST,
    LEAST,
    POLICIES,
    SLACK,
    Outcome,
    check_captured,
    checks,
    contrasts,
    distance,
    entries,
    within,
)
from benchmarks.vllm_gpu_engines import _error, _kept, bounds_error, entry, worst_layer
from persona_axis.model.reading import Passage, read_passages
from persona_axis.serve.vllm.frontend import _as_text
from persona_axis.steering import interventions
from persona_axis.steering.hooks import held
from persona_axis.steering.interventions import Intervention
from persona_axis.steering.policy import Policy

ROOT = Path(__file__).parents[2]
TEXTS, TOKENS = 3, 6
NOISE = 0.01  # nats

# What each policy does to log-probabilities of given texts, and to what is said after the first token.
EFFECT = {"off": 0.0, "first": 0.6, "second": 0.9, "decoding": 0.0, None: 0.0}
SAYS = {"off": 10, "first": 20, "second": 30, "decoding": 40, None: 10}


# ---- engines that do everything right ----------------------------------------------------------------------------


def compared(policies: tuple[str | None, ...], seed: int) -> dict[str, Any]:
    """Given texts and replies, alone and batched, with the noise of a GPU."""
    random = np.random.default_rng(seed)

    def given_text(text: int, policy: str | None) -> dict[str, Any]:
        base = -2.0 - 0.1 * np.arange(TOKENS) - EFFECT[policy]
        return said([text] * TOKENS, base + random.normal(0, NOISE, TOKENS))

    def reply(text: int, policy: str | None) -> dict[str, Any]:
        ids = [text, *[SAYS[policy]] * (TOKENS - 1)]
        return said(ids, -1.0 - EFFECT[policy] + random.normal(0, NOISE, TOKENS))

    jobs = [(text, policy) for text in range(TEXTS) for policy in policies]
    paths = {"given": given_text, "greedy": reply}
    companies = ("alone", "batched")
    return {
        "policies": list(policies),
        **{path: {c: [one(*job) for job in jobs] for c in companies} for path, one in paths.items()},
    }


def said(ids: list[int], logprobs: Any) -> dict[str, Any]:
    steps = [{str(i): float(p), "999": -6.0} for i, p in zip(ids, logprobs, strict=True)]
    return {"ids": ids, "steps": steps}


def observed(runner: str, seed: int, eager: bool = False, workers: int = 1) -> dict[str, Any]:
    state = {"runner": runner, "version": "1", "layers": [0, 1], "policies": {"first": "a"}}
    endings = {"eos": ("stop", None), "length": ("length", None), "string": ("stop", ".")}
    replies = [
        {"policy": policy, "finish": finish, "stop": stop, "tokens": 9, "n_counted": 8, "bounds_error": 1e-4}
        for policy in ("off", "typical")
        for finish, stop in endings.values()
    ]
    return {
        "armed": True,
        "eager": eager,
        "graphs": "NONE" if eager else "FULL_AND_PIECEWISE",
        "asynchronous": True,
        "workers": [dict(state) for _ in range(workers)],
        "replies": replies,
        "after_abort": {"running": 1, "users": 0, "places_taken": 0, "places_taken_before": 8},
        **compared(POLICIES, seed),
    }


def right() -> dict[str, Any]:
    runs: dict[str, Any] = {
        "plain": {"armed": False, "refusal": "no plugin", **compared((None,) * len(POLICIES), 0)},
        "graphs": observed("V2", 1),
        "V1": observed("V1", 2),
        "eager": observed("V2", 3, eager=True),
        "pair": observed("V2", 4, workers=2),
        "cached": [{"cached": n} for n in (0, 96, 0, 96, 0, 96)],
        "preempted": {"preemptions": 5, "replies": [{"n_counted": 191, "tokens": 192}]},
        "speed": {
            "ratio": 0.99,
            "low": 0.98,
            "high": 1.0,
            "target": 0.97,
            "met": True,
            "details": {"milliseconds_per_step_more": 0.01},
        },
    }
    for name in ("graphs", "V1", "eager", "pair", "cached", "preempted"):
        runs[f"{name}, read again"] = [4e-3, 6e-3]
    return runs


def failed(runs: dict[str, Any], gpus: int = 2) -> list[str]:
    return [outcome.name for outcome in judged(checks(gpus), runs) if outcome.holds is False]


def test_all_is_met_where_all_is_right() -> None:
    outcomes = list(judged(checks(2), right()))
    assert [o.line() for o in outcomes if o.holds is not True] == []
    assert len({o.name for o in outcomes}) == len(outcomes)
    assert exit_code(outcomes) == 0


# ---- what goes wrong ---------------------------------------------------------------------------------------------


def as_if(run: dict[str, Any], path: str, company: str, policy: str, other: str) -> None:
    """Requests under ``policy`` are run as if under ``other``."""
    found, names = run[path][company], run["policies"]
    for text in range(TEXTS):
        first = text * len(names)
        found[first + names.index(policy)] = copy.deepcopy(found[first + names.index(other)])


def everywhere(run: dict[str, Any], policy: str, other: str) -> None:
    for path in ("given", "greedy"):
        for company in ("alone", "batched"):
            as_if(run, path, company, policy, other)


def noisier(run: dict[str, Any], company: str, by: float, policy: str = "") -> None:
    """Given texts under a policy, or under all, are off by so much."""
    chosen = entries(run, "given", company, policy) if policy else run["given"][company]
    for step in (step for e in chosen for step in e["steps"]):
        step.update({token: p - by for token, p in step.items()})


Fault = Callable[[dict[str, Any]], Any]
FAULTS: dict[str, tuple[Fault, set[str]]] = {
    "V1 where V2 should be": (
        lambda runs: runs["graphs"]["workers"][0].update(runner="V1"),
        {"graphs: model runner V2"},
    ),
    "no graphs": (lambda runs: runs["graphs"].update(graphs="NONE"), {"graphs: CUDA graphs are on"}),
    "eager by itself": (lambda runs: runs["graphs"].update(eager=True), {"graphs: CUDA graphs are on"}),
    "synchronous": (
        lambda runs: runs["graphs"].update(asynchronous=False),
        {"graphs: asynchronous scheduling is on"},
    ),
    "the batch's prompts under a mate's policy": (
        lambda runs: as_if(runs["V1"], "given", "batched", "first", "second"),
        {"V1: batchmates as alone, given tokens"},
    ),
    "the batch's prompts off": (
        lambda runs: as_if(runs["graphs"], "given", "batched", "second", "off"),
        {"graphs: batchmates as alone, given tokens"},
    ),
    "the batch's replies under a mate's policy": (
        lambda runs: as_if(runs["eager"], "greedy", "batched", "off", "first"),
        {"eager: batchmates as alone, greedy tokens"},
    ),
    "no policy does anything": (
        lambda runs: [everywhere(runs["V1"], policy, "off") for policy in POLICIES[1:]],
        {
            "V1: capped output differs from off",
            "V1: batchmates as alone, given tokens",
            "V1: batchmates as alone, greedy tokens",
        },
    ),
    "the operator is not in the graphs of decode steps": (
        lambda runs: everywhere(runs["graphs"], "decoding", "off"),
        {"graphs: capped output differs from off", "graphs: capped as in an eager engine, greedy tokens"},
    ),
    "a policy for generated tokens changes prompts": (
        lambda runs: [noisier(runs["pair"], c, 0.05, "decoding") for c in ("alone", "batched")],
        {"pair: capped output differs from off"},
    ),
    "another cap in graphs than in eager mode": (
        lambda runs: everywhere(runs["eager"], "first", "second"),
        {"graphs: capped as in an eager engine, given tokens", "graphs: capped as in an eager engine, greedy tokens"},
    ),
    "projections that do not fit": (
        lambda runs: runs["V1"]["replies"][-1].update(bounds_error=5e-3),
        {"V1: projections and captured means fit the bounds"},
    ),
    "a captured mean is wrong": (
        lambda runs: runs["graphs, read again"].append(2e-2),
        {"graphs: captured means as Hugging Face's"},
    ),
    "a captured mean is nan": (
        lambda runs: runs["graphs, read again"].append(math.nan),
        {"graphs: captured means as Hugging Face's"},
    ),
    "nothing was captured": (
        lambda runs: runs["eager, read again"].clear(),
        {"eager: captured means as Hugging Face's"},
    ),
    "the last token counts": (
        lambda runs: runs["V1"]["replies"][0].update(n_counted=9),
        {"V1: captured means as Hugging Face's"},
    ),
    "aborted requests keep their places": (
        lambda runs: runs["graphs"]["after_abort"].update(places_taken=8),
        {"graphs: aborted requests free what they held"},
    ),
    "aborted requests keep their policy": (
        lambda runs: runs["graphs"]["after_abort"].update(users=8),
        {"graphs: aborted requests free what they held"},
    ),
    "nothing ran when it was aborted": (
        lambda runs: runs["graphs"]["after_abort"].update(places_taken_before=0),
        {"graphs: aborted requests free what they held"},
    ),
    "blocks shared across policies": (
        lambda runs: runs["cached"][2].update(cached=96),
        {"prefix caching: within a policy, never across"},
    ),
    "blocks not shared within a policy": (
        lambda runs: runs["cached"][3].update(cached=0),
        {"prefix caching: within a policy, never across"},
    ),
    "capture wrong under prefix caching": (
        lambda runs: runs["cached, read again"].append(0.5),
        {"prefix caching: captured means as Hugging Face's"},
    ),
    "positions counted twice": (
        lambda runs: runs["preempted, read again"].append(0.2),
        {"preemption: each position once"},
    ),
    "nothing was preempted": (
        lambda runs: runs["preempted"].update(preemptions=0),
        {"preemption: each position once"},
    ),
    "the plugin is there though disabled": (
        lambda runs: runs["plain"].update(armed=True),
        {"PERSONA_AXIS_DISABLE=1: no plugin, and refused"},
    ),
    "served though disabled": (
        lambda runs: runs["plain"].update(refusal=""),
        {"PERSONA_AXIS_DISABLE=1: no plugin, and refused"},
    ),
    "off is not plain vLLM": (
        lambda runs: [noisier(runs["graphs"], c, 0.5) for c in ("alone", "batched")],
        {"PERSONA_AXIS_DISABLE=1: no plugin, and refused"},
    ),
    "too slow": (
        lambda runs: runs["speed"].update(met=False),
        {"plugin and policy >= 0.97 x tokens/s without"},
    ),
    "a rank holds less": (
        lambda runs: runs["pair"]["workers"][1].update(layers=[0]),
        {"pair: both ranks hold every layer, alike"},
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_noticed(name: str) -> None:
    fault, noticed = FAULTS[name]
    runs = right()
    fault(runs)
    found = set(failed(runs))
    assert noticed <= found
    # A graphs engine that is another way off than eager is seen there too; nothing of other engines is.
    strangers = {f for f in found - noticed if f.split(":")[0] not in {n.split(":")[0] for n in noticed}}
    assert strangers <= {"graphs: capped as in an eager engine, given tokens"}
    assert exit_code(list(judged(checks(2), runs))) == 1


@pytest.mark.parametrize("ending", ["eos", "length", "string"])
def test_capture_is_not_met_while_an_ending_was_not_seen(ending: str) -> None:
    runs = right()
    wanted = {"eos": ("stop", None), "length": ("length", None), "string": ("stop", ".")}[ending]
    runs["V1"]["replies"] = [r for r in runs["V1"]["replies"] if (r["finish"], r["stop"]) != wanted]
    outcome = check_captured("V1", runs)
    assert not outcome.holds
    assert f"no reply ended by {ending}" in outcome.detail


def test_a_stop_token_is_no_stop_string() -> None:
    runs = right()
    for reply in runs["V1"]["replies"]:
        if reply["stop"] == ".":
            reply["stop"] = 151645
    assert "no reply ended by string" in check_captured("V1", runs).detail


def test_noise_as_large_as_plain_vllms_is_no_fault() -> None:
    runs = right()
    for run in (runs["plain"], *(runs[name] for name in ("graphs", "V1", "eager"))):
        noisier(run, "batched", 0.05)
    assert not failed(runs)
    noisier(runs["V1"], "batched", 0.3)
    assert failed(runs) == ["V1: batchmates as alone, given tokens"]


# ---- comparisons -------------------------------------------------------------------------------------------------


def test_replies_are_compared_up_to_the_token_at_which_they_part() -> None:
    a = {"ids": [1, 2, 3], "steps": [{"1": -1.0}, {"2": -1.0, "5": -1.5}, {"3": -9.0}]}
    b = {"ids": [1, 5, 3], "steps": [{"1": -1.2}, {"5": -1.1, "2": -1.4}, {"3": -1.0}]}
    assert distance([a], [b]) == pytest.approx((0.2 + 0.4) / 2)
    unlikely = {"ids": [1, 5, 3], "steps": [{"1": -1.2}, {"5": -0.1, "7": -4.0}, {"3": -1.0}]}
    assert distance([a], [unlikely]) == pytest.approx((0.2 + 3.0) / 2)
    assert distance([a, a], [a, a]) == 0
    assert math.isnan(distance([], []))


@given(st.floats(0, 10), st.floats(0, 10))
def test_what_is_no_more_than_noise_is_no_contrast(found: float, noise: float) -> None:
    assert within(found, noise) == (found <= max(LEAST, SLACK * noise))
    assert not (within(found, noise) and contrasts(found, noise))
    assert contrasts(CONTRAST * max(LEAST, noise), noise)


def test_nan_is_neither() -> None:
    assert not within(math.nan, 1.0)
    assert not within(1.0, math.nan)
    assert not contrasts(math.nan, 0.0)


def test_the_worst_layer_counts() -> None:
    want = np.array([[3.0, 4.0], [0.0, 10.0]])
    assert worst_layer(want + np.array([[0.0, 0.5], [0.0, 0.1]]), want) == pytest.approx(0.1)
    assert worst_layer(want, want) == 0


@pytest.mark.parametrize("seed", range(3))
def test_projections_and_means_fit_the_bounds_when_the_formula_was_applied(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    V = interventions.orthonormal(torch.randn(2, 16, generator=random))
    shift = torch.randn(2, generator=random)
    part = Intervention(1, V, torch.tensor([0.1, -0.4]), torch.tensor([math.inf, 0.2]), shift)
    stream = torch.randn(40, 16, generator=random)
    before = {1: (stream @ V.T).numpy()}

    def error(tokens: torch.Tensor) -> float:
        return bounds_error(Policy((part,)), np.stack([np.zeros(16), tokens.mean(0).numpy()]), before)

    assert error(interventions.apply(stream, part)) < 1e-5
    assert error(stream) > 0.05
    assert error(interventions.apply(stream, part)[1:]) > 1e-3  # a token was left out


@pytest.mark.parametrize("name", ["off", "held"])
def test_a_kept_reply_is_read_again_as_it_was_captured(name: str, tiny: Any, tmp_path: Path) -> None:
    chat = tiny("llama")
    direction = torch.randn(chat.d_model, generator=torch.Generator().manual_seed(0))
    policy = Policy((interventions.cap(1, direction, 50.0),))
    policy.save(tmp_path / "held")
    prompt, reply = [5, 6, 7], [8, 9, 10, 11]
    passage = Passage("reply", (*prompt, *reply), ((3, 6),))  # the last token does not count
    with held(chat, policy) if name == "held" else nullcontext():
        [(_, [activation])] = read_passages(chat, [passage])

    def error(captured: torch.Tensor) -> float:
        _kept(finished(prompt, reply, captured.numpy()), name, None, tmp_path / "replies")
        [file] = (tmp_path / "replies").glob("*.npz")
        found = _error(chat, file, tmp_path)
        file.unlink()
        return found

    assert error(activation) < 1e-6
    [(_, [all_counted])] = read_passages(chat, [Passage("reply", (*prompt, *reply), ((3, 7),))])
    assert error(all_counted) > 1e-2


def finished(prompt: list[int], reply: list[int], activation: np.ndarray) -> Any:
    """As vLLM gives it, with a worker's report."""
    report = {
        "policy": "any",
        "content_hash": "a",
        "strength": 1.0,
        "n_counted": len(reply) - 1,
        "layers": list(range(len(activation))),
        "activation": _as_text(activation),
    }
    said = SimpleNamespace(token_ids=reply, finish_reason="length", stop_reason=None)
    return SimpleNamespace(
        request_id="1", prompt_token_ids=prompt, outputs=[said], kv_transfer_params={"persona_axis": report}
    )


def test_an_entry_has_a_step_for_each_token() -> None:
    class One:
        logprob = -0.5

    assert entry([7], [{7: One()}]) == {"ids": [7], "steps": [{"7": -0.5}]}
    with pytest.raises(AssertionError):
        entry([7, 8], [{7: One()}])


# ---- engines that fail, and the command --------------------------------------------------------------------------


def test_an_engine_is_asked_once_and_its_failure_is_no_other_checks() -> None:
    asked: list[str] = []
    answers = right()

    def ask(name: str, runs: Asked) -> Any:
        asked.append(name)
        if name == "V1":
            raise ChildFailed("out of memory")
        return answers[name]

    runs = Asked({name: partial(ask, name) for name in answers})
    outcomes = list(judged(checks(2), runs))
    assert sorted(asked) == sorted(set(asked))
    bad = [o for o in outcomes if o.holds is False]
    assert bad
    assert {o.detail for o in bad} == {"out of memory"}
    assert all("V1" in o.name for o in bad)
    assert "batchmates V1 greedy" in {o.name for o in bad}
    assert exit_code(outcomes) == 1


def test_one_gpu_leaves_two_open_and_starts_nothing_on_them() -> None:
    runs = right()
    del runs["pair"], runs["pair, read again"]
    outcomes = list(judged(checks(1), runs))
    assert {o.name for o in outcomes if o.holds is None} == {
        "pair: ranks",
        "pair: changes",
        "pair: bounds",
        "pair: captured",
    }
    assert exit_code(outcomes) == 0


def test_a_speed_that_cannot_be_told_is_open() -> None:
    runs = right()
    runs["speed"]["met"] = None
    assert not failed(runs)
    assert "open" in list(judged(checks(1), runs))[-1].line()


def test_the_table_says_how_many() -> None:
    outcomes = [Outcome("a", True), Outcome("b", False, "off by 3"), Outcome("c", None, "one GPU"), Outcome("d", True)]
    text = table(outcomes)
    assert text.endswith("4 checks: 2 met, 1 NOT MET, 1 open")
    line = next(line for line in text.splitlines() if line.startswith("b "))
    assert "NOT MET" in line
    assert "off by 3" in line


def test_what_is_written_is_json() -> None:
    kept = finite({"a": [math.nan, 1.0, (math.inf, "x", None, True)]})
    assert json.loads(json.dumps(kept, allow_nan=False)) == {"a": [None, 1.0, [None, "x", None, True]]}


def test_every_check_and_its_verdict_are_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vllm_gpu, "lacking", lambda: "")
    monkeypatch.setattr(vllm_gpu, "_devices", lambda start: {"gpus": ["one"]})
    runs = right()
    runs["cached"][2]["cached"] = 96
    monkeypatch.setattr(vllm_gpu, "makers", lambda *args: {n: lambda _, n=n: runs[n] for n in runs})
    out = tmp_path / "new" / "found.json"
    assert vllm_gpu.main(["--model", "somebody/model", "--out", str(out)]) == 1
    written = json.loads(out.read_text())
    assert written["model"] == "somebody/model"
    assert len(written["checks"]) == len(checks(1))
    assert [c["name"] for c in written["checks"] if c["holds"] is False] == [
        "prefix caching: within a policy, never across"
    ]
    assert f"{len(checks(1))} checks: {len(checks(1)) - 5} met, 1 NOT MET, 4 open" in capsys.readouterr().out


def test_without_a_gpu_or_vllm_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert vllm_gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(vllm_gpu, "missing", lambda: "no vLLM here")
    assert vllm_gpu.main([]) == 2
    assert "no vLLM here" in capsys.readouterr().err


def test_it_imports_no_vllm_before_an_engine_starts() -> None:
    code = "import sys; sys.modules['vllm'] = None; import benchmarks.vllm_gpu, benchmarks.vllm_gpu_engines"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
