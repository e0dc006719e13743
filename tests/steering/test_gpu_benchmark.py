"""The checks of ``benchmarks/gpu_intervention.py`` on the CPU: they hold, and they notice an operator that is wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_intervention
from benchmarks.gpu_intervention import Check, Sizes, check_compiled, check_decoder, check_operator
from persona_axis.steering.op import intervene_

CPU = torch.device("cpu")
SMALL = Sizes(d_model=16, layers=3, heads=2, kv_heads=1, ff=24, batch=10, context=4)


def failures(checks: Any) -> list[str]:
    return [check.line() for check in checks if not check.holds]


def test_the_operator_and_the_decoder_pass() -> None:
    assert not failures(check_operator(CPU, ((9, 24, 1), (7, 33, 3))))
    for dtype in (torch.float32, torch.bfloat16):
        assert not failures(check_decoder(CPU, SMALL, dtype))
    torch._dynamo.reset()
    assert not failures(check_compiled(CPU, SMALL))


def nothing(hidden: Tensor, *rest: Any) -> None:
    """An operator that is not there."""


def rounded(hidden: Tensor, *rest: Any) -> None:
    """Rounds once too often."""
    intervene_(hidden, *rest)
    hidden.copy_(hidden.half())


def blind(hidden: Tensor, V: Tensor, lo: Tensor, hi: Tensor, shift: Tensor, slots: Tensor, *rest: Any) -> None:
    """Sees only half of the stream."""
    intervene_(hidden, V, lo, hi, shift, slots, None, *rest[1:])


def indifferent(hidden: Tensor, V: Tensor, lo: Tensor, hi: Tensor, shift: Tensor, slots: Tensor, *rest: Any) -> None:
    """Steers every row."""
    intervene_(hidden, V, lo, hi, shift, slots.clamp(min=1), *rest)


def stale() -> Callable[..., None]:
    """Keeps the policy it saw first, as a graph would that holds copies."""
    seen: dict[int, tuple[Tensor, ...]] = {}

    def op(hidden: Tensor, *rest: Any) -> None:
        policy = seen.setdefault(rest[0].data_ptr(), tuple(t.clone() for t in rest[:5]))
        intervene_(hidden, *policy, *rest[5:])

    return op


@pytest.mark.parametrize("wrong", [nothing, rounded, blind, indifferent, stale()], ids=lambda f: f.__name__)
def test_they_notice_an_operator_that_is_wrong(wrong: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_intervention, "intervene_", wrong)
    assert failures(check_decoder(CPU, SMALL, torch.float32))


def test_one_failed_check_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("check_operator", "check_compiled"):
        monkeypatch.setattr(gpu_intervention, name, lambda *args: iter([Check("a", True)]))
    monkeypatch.setattr(gpu_intervention, "check_decoder", lambda *args: iter([Check("b", False, "off by 3")]))
    assert gpu_intervention.main(["--device", "cpu"]) == 1
    assert "2 of 4 met" in capsys.readouterr().out
    monkeypatch.setattr(gpu_intervention, "check_decoder", lambda *args: iter([Check("b", True)]))
    assert gpu_intervention.main(["--device", "cpu"]) == 0


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_intervention.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_it_runs_where_little_is_installed() -> None:
    heavy = {"pydantic", "pyarrow", "sklearn", "plotly", "typer", "rich", "safetensors", "transformers", "psutil"}
    code = f"import sys, benchmarks.gpu_intervention; print(sorted({heavy!r} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
