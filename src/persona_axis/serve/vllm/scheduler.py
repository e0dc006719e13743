"""The plugin in the engine core: what workers report of a request goes out with the request's answer.

It travels in ``kv_transfer_params``, the one field that vLLM carries from the scheduler to every kind of answer.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from persona_axis.serve.vllm.keys import TICKET

REPORTS = "persona_axis_reports"  # the attribute of a scheduler


def install() -> None:
    """Wrap vLLM's scheduler."""
    from vllm.v1.core.sched.scheduler import Scheduler

    original = Scheduler.update_from_output

    @wraps(original)
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        reports: dict[str, dict[str, Any]] = self.__dict__.setdefault(REPORTS, {})
        reports.update(getattr(model_runner_output, TICKET, {}))
        strings = {r for r in scheduler_output.num_scheduled_tokens if _stops_at_strings(self.requests.get(r))}
        answers = original(self, scheduler_output, model_runner_output)
        attach(answers, reports, strings)
        for gone in [r for r in reports if r not in self.requests]:
            del reports[gone]
        return answers

    Scheduler.update_from_output = update_from_output


def attach(answers: Any, reports: dict[str, dict[str, Any]], strings: set[str]) -> None:
    """A request's last answer carries its report; each one, where only the front end knows which is the last."""
    for batch in answers.values():
        for answer in batch.outputs:
            report = reports.get(answer.request_id)
            if report is not None and (answer.finish_reason is not None or answer.request_id in strings):
                answer.kv_transfer_params = {**(answer.kv_transfer_params or {}), TICKET: report}


def _stops_at_strings(request: Any) -> bool:
    return request is not None and request.sampling_params is not None and bool(request.sampling_params.stop)
