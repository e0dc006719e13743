"""What workers report of a request, on its way through the scheduler and the front end to whoever asked."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from persona_axis.errors import PersonaAxisError
from persona_axis.serve.vllm import frontend, scheduler, worker
from persona_axis.serve.vllm.held import _packed
from persona_axis.serve.vllm.keys import TICKET

HASH = "c" * 64


def said(request: str = "r", collects: bool = True, **more: Any) -> dict[str, Any]:
    return {
        "policy": "calm",
        "content_hash": HASH,
        "strength": 1.0,
        "request": request,
        "collects": collects,
        **more,
    }


# ---- from the worker to the scheduler -------------------------------------------------------------------------------


class Reporting:
    """A held model of which requests have started."""

    def __init__(self) -> None:
        self.reports = {"r": said()}

    def take_reports(self) -> dict[str, Any]:
        reports, self.reports = self.reports, {}
        return reports


def test_reports_leave_with_the_output_of_the_step_once() -> None:
    held: Any = Reporting()
    first, second = SimpleNamespace(req_ids=["r"]), SimpleNamespace(req_ids=["r"])
    assert worker._with_reports(held, first) is first
    assert worker._with_reports(held, second) is second
    assert first.persona_axis == {"r": said()}
    assert not hasattr(second, "persona_axis")


@pytest.mark.parametrize("output", [None, SimpleNamespace(req_ids=[]), SimpleNamespace(tensors={})])
def test_reports_wait_where_the_output_is_of_no_request(output: Any) -> None:
    """Of a step that fed nothing, or of a stage that is not the last."""
    held: Any = Reporting()
    assert worker._with_reports(held, output) is output
    assert held.reports == {"r": said()}


def test_reports_of_an_asynchronous_step_come_with_its_output() -> None:
    held: Any = Reporting()
    output = SimpleNamespace(req_ids=["r"])
    later = SimpleNamespace(get_output=lambda: output)
    assert worker._with_reports(held, later) is later
    held.reports = {"s": said("s")}  # of the next step, which starts before this one's output is read
    assert later.get_output() is output
    assert output.persona_axis == {"r": said()}


# ---- from the scheduler to the front end ----------------------------------------------------------------------------


def answer(request: str, finish_reason: str | None = None, params: dict[str, Any] | None = None) -> Any:
    return SimpleNamespace(request_id=request, finish_reason=finish_reason, kv_transfer_params=params)


def test_the_last_answer_of_a_request_carries_its_report() -> None:
    answers = [answer("r"), answer("s", "stop"), answer("t", "length", {"other": 1}), answer("u", "stop")]
    batches = {0: SimpleNamespace(outputs=answers[:2]), 1: SimpleNamespace(outputs=answers[2:])}
    reports = {name: said(name) for name in "rst"}
    scheduler.attach(batches, reports, set())
    assert [a.kv_transfer_params for a in answers] == [
        None,
        {TICKET: said("s")},
        {"other": 1, TICKET: said("t")},
        None,
    ]


def test_every_answer_carries_it_where_the_front_end_looks_for_stop_strings() -> None:
    answers = [answer("r"), answer("s")]
    scheduler.attach({0: SimpleNamespace(outputs=answers)}, {"r": said("r"), "s": said("s")}, {"s", "gone"})
    assert [a.kv_transfer_params for a in answers] == [None, {TICKET: said("s")}]


@pytest.mark.parametrize(("stop", "wanted"), [(["\n"], True), ([], False), (None, False)])
def test_requests_with_stop_strings_are_told_from_others(stop: Any, wanted: bool) -> None:
    assert scheduler._stops_at_strings(SimpleNamespace(sampling_params=SimpleNamespace(stop=stop))) is wanted
    assert not scheduler._stops_at_strings(SimpleNamespace(sampling_params=None))
    assert not scheduler._stops_at_strings(None)


# ---- in the front end -----------------------------------------------------------------------------------------------


def ended(report: dict[str, Any] | None, tokens: int = 3, reason: str | None = "stop") -> Any:
    """A ``RequestOutput``."""
    params = {"other": 1} if report is None else {TICKET: report}
    reply = SimpleNamespace(token_ids=list(range(tokens)), finish_reason=reason)
    return SimpleNamespace(request_id="r", outputs=[reply], kv_transfer_params=params, finished=reason is not None)


def test_only_what_collected_something_is_fetched_and_is_told_how_many_tokens_count() -> None:
    one, two, three, none = said("a"), said("b", collects=False), said("c"), said("d")
    outputs = [ended(report) for report in (one, two, three, none)]
    assert frontend._wanting(outputs, [5, 5, 1, 0]) == [one, three, none]
    assert [report.get("n_counted") for report in (one, two, three, none)] == [4, None, 0, 0]


@pytest.mark.parametrize("params", [None, {}, {"other": 1}])
def test_an_answer_without_a_report_is_an_error(params: Any) -> None:
    output = ended(None)
    output.kv_transfer_params = params
    with pytest.raises(PersonaAxisError, match="Request r came back without a worker's word"):
        frontend._wanting([output], [3])
    with pytest.raises(PersonaAxisError, match="Request r came back without a worker's word"):
        frontend.report_of(output)


def test_an_aborted_request_needs_no_report() -> None:
    assert frontend._wanting([ended(None, reason="abort")], [3]) == []


def collected(layers: list[int], value: float, directions: dict[int, int], count: int = 2) -> dict[str, Any]:
    """What a rank hands out."""
    return {
        "layers": layers,
        "activation_sum": _packed(torch.tensor([[value + layer] * 4 for layer in layers])),
        "projections": {
            str(layer): _packed(value + layer + torch.arange(count * k).reshape(count, k).float())
            for layer, k in directions.items()
        },
    }


def test_what_was_collected_comes_back_as_it_was_through_json() -> None:
    report = said("r", n_counted=2)
    frontend._put([report], [[collected([0, 1], 10.0, {1: 2})]])
    got = frontend.report_of(ended(json.loads(json.dumps(report))))
    assert (got.policy, got.content_hash, got.strength, got.n_counted) == ("calm", HASH, 1.0, 2)
    assert got.layers == (0, 1)
    assert got.activation is not None
    assert got.activation.dtype == np.float32
    assert got.activation.tolist() == [[5.0] * 4, [5.5] * 4]
    assert got.projections is not None
    assert {layer: p.tolist() for layer, p in got.projections.items()} == {1: [[11.0, 12.0], [13.0, 14.0]]}


def test_a_report_of_a_request_that_collected_nothing() -> None:
    got = frontend.report_of(ended(said(collects=False), tokens=5))
    assert (got.policy, got.n_counted, got.layers, got.activation, got.projections) == ("calm", 4, (), None, None)
    assert frontend.report_of(ended(said(collects=False), tokens=0)).n_counted == 0


def test_a_reply_of_which_no_token_counts_has_no_mean() -> None:
    report = said("r", n_counted=0)
    frontend._put([report], [[collected([0, 1], 0.0, {1: 2}, count=0)]])
    got = frontend.report_of(ended(json.loads(json.dumps(report)), tokens=1))
    assert got.activation is None
    assert got.projections is not None
    assert got.projections[1].size == 0


def test_what_was_not_to_be_had_is_an_error_of_that_request_alone() -> None:
    good, bad = said("a", n_counted=2), said("b", n_counted=2)
    parts = collected([0], 1.0, {}), {"error": "all 1 places were taken"}
    frontend._put([good, bad], [parts, (collected([1], 1.0, {}), collected([1], 1.0, {}))])  # type: ignore[list-item]
    assert frontend.report_of(ended(good)).layers == (0, 1)
    with pytest.raises(PersonaAxisError, match="Request r: all 1 places were taken"):
        frontend.report_of(ended(bad))


def test_a_worker_that_answers_for_other_requests_is_noticed() -> None:
    part = collected([0], 1.0, {})
    for answers in ([[part], []], [[part], [part, part]], [[part, part]]):
        with pytest.raises(ValueError, match="argument"):
            frontend._put([said("a", n_counted=1)], answers)


# ---- several ranks --------------------------------------------------------------------------------------------------


def test_stages_of_a_pipeline_are_joined_in_the_order_of_their_layers() -> None:
    late, early = collected([2, 3], 1.0, {3: 1}), collected([0, 1], 1.0, {0: 1, 1: 2})
    together = frontend.joined([late, early], 2)
    assert together == frontend.joined([collected([0, 1, 2, 3], 1.0, {0: 1, 1: 2, 3: 1})], 2)
    assert together["layers"] == [0, 1, 2, 3]


def test_of_tensor_ranks_one_is_taken() -> None:
    rank = collected([0, 1], 1.0, {1: 1})
    assert frontend.joined([rank, collected([0, 1], 1.0, {1: 1})], 2) == frontend.joined([rank], 2)
    both = [collected(layers, 1.0, {layers[0]: 1}) for layers in ([2], [0, 1], [2], [0, 1])]
    assert frontend.joined(both, 2)["layers"] == [0, 1, 2]


def test_only_what_was_asked_for_is_joined() -> None:
    parts = [{key: value for key, value in collected([0], 1.0, {0: 1}).items() if key != "projections"}]
    assert frontend.joined(parts, 2).keys() == {"layers", "activation"}
    parts = [{key: value for key, value in collected([0], 1.0, {0: 1}).items() if key != "activation_sum"}]
    assert frontend.joined(parts, 2).keys() == {"layers", "projections"}
