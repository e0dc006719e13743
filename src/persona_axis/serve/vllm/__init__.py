"""The vLLM plugin: capping, capture and projections inside the engine.

vLLM finds it by its entry point (``plugin.py``) in every process it starts. In the worker, every decoder layer gets one
custom operator (``layers.py``), which reads persistent buffers (``bank.py``, ``sums.py``) that are filled before each
forward from what the engine is about to run (``held.py``, ``runners.py``, ``worker.py``). In the front end, requests
are checked and answers come back with what the worker reports (``frontend.py``). ``launch.py`` asks every worker what
it holds and refuses to serve when that is not what was asked for.

Nothing here imports vLLM or torch until it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persona_axis.serve.vllm.engine import VLLMEngine
    from persona_axis.serve.vllm.frontend import Report, report_of
    from persona_axis.serve.vllm.launch import load, serve, unload, verify, verify_async

_WHERE = {
    "VLLMEngine": "engine",
    "Report": "frontend",
    "report_of": "frontend",
    "load": "launch",
    "serve": "launch",
    "unload": "launch",
    "verify": "launch",
    "verify_async": "launch",
}
__all__ = ["Report", "VLLMEngine", "load", "report_of", "serve", "unload", "verify", "verify_async"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
