"""An engine that does not hold what it should is not served: plugins that are missing, and code compiled before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_forward import continued
from real_engines import Server, program, python

from persona_axis.steering.interventions import cap
from persona_axis.steering.policy import Policy

pytestmark = pytest.mark.serving

PROMPT = [1, 50, 600, 7000, 30, 4]
TOKENS = 12

# Starts an engine of the model given, compiled, and says what it says.
START = f"""
import json, sys
from vllm import LLM, SamplingParams
from persona_axis.errors import PersonaAxisError
from persona_axis.serve.vllm import launch, report_of

llm = LLM(sys.argv[1], dtype="float32", max_model_len=128, max_num_seqs=4, kv_cache_memory_bytes=1 << 24)
said = {{}}
try:
    said["states"] = launch.verify(llm)
except PersonaAxisError as e:
    said["refused"] = str(e)
parameters = SamplingParams(temperature=0, max_tokens={TOKENS}, ignore_eos=True)
output = llm.generate({{"prompt_token_ids": {PROMPT}}}, parameters, use_tqdm=False)[0]
said["tokens"] = list(output.outputs[0].token_ids)
try:
    said["held_by"] = report_of(output).content_hash
except PersonaAxisError as e:
    said["no_report"] = str(e)
open(sys.argv[2], "w").write(json.dumps(said))
"""

# Found first on the path of every process: the plugin's module does not import.
BROKEN = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "persona_axis.serve.vllm.plugin":
            raise ImportError("broken on purpose")
sys.meta_path.insert(0, Broken())
"""


@pytest.fixture(scope="module")
def plain_tiny(tiny_folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Policy]]:
    """Two policies for the random model."""
    random = torch.Generator().manual_seed(1)
    folder = tmp_path_factory.mktemp("two")
    made = {}
    for name in ("one", "other"):
        policy = Policy(tuple(cap(layer, torch.randn(64, generator=random), 6.0) for layer in (0, 1, 2)))
        made[name] = (policy.save(folder / name), policy)
    return made


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    return tmp_path


# ---- plugins that are missing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("why", ["broken", "left out"])
def test_our_launcher_refuses_an_engine_without_the_plugin(
    why: str, tiny_folder: Path, two: dict[str, tuple[Path, Policy]], broken: Path, tmp_path: Path
) -> None:
    """vLLM itself only logs that."""
    changes = {"PYTHONPATH": broken} if why == "broken" else {"VLLM_PLUGINS": "other"}
    command = [program("persona-axis"), "vllm", tiny_folder, "--policies", two["one"][0], "--enforce-eager"]
    server = Server(command, tmp_path / "log", **changes)
    assert server.ended() == 1
    assert "do not answer as the persona-axis plugin does" in server.said
    assert "nothing would be held" in server.said
    assert "Application startup complete" not in server.said


# ---- code that was compiled before ---------------------------------------------------------------------------------


def compiled_code(cache: Path) -> set[str]:
    """Hashes of what was compiled."""
    return {model.parents[1].name for model in cache.glob("torch_compile_cache/torch_aot_compile/*/rank_0_0/model")}


def test_a_warm_compile_cache_holds_no_policy_and_no_plugin(
    tiny_folder: Path, plain_tiny: Any, two: dict[str, tuple[Path, Policy]], tmp_path: Path
) -> None:
    """Four starts on one cache: under a policy, under another, with the plugin off, and without it.

    vLLM 0.32 on a CPU finds the code of an earlier start and cannot load it, with or without the plugin; it then
    compiles again, from the pieces in its cache.
    """

    def start(**changes: Any) -> dict[str, Any]:
        said = tmp_path / "said.json"
        ended = python(
            START,
            tiny_folder,
            said,
            VLLM_CACHE_ROOT=tmp_path / "cache",
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            **changes,
        )
        assert ended.returncode == 0, ended.stderr
        return dict(json.loads(said.read_text()))

    plain = continued(plain_tiny, PROMPT, TOKENS, None)
    code = []
    for folder, policy in two.values():
        said = start(PERSONA_AXIS_POLICIES=folder, PERSONA_AXIS_DEFAULT=folder.name)
        assert said["states"][0]["policies"] == {folder.name: policy.content_hash}
        assert said["held_by"] == policy.content_hash
        assert said["tokens"] == continued(plain_tiny, PROMPT, TOKENS, policy) != plain
        code.append(compiled_code(tmp_path / "cache"))
    first, second = code
    assert len(first) == 1
    assert second == first  # the second start had a use for the first one's

    off = start(PERSONA_AXIS_DISABLE="1", PERSONA_AXIS_POLICIES=two["one"][0], PERSONA_AXIS_DEFAULT="one")
    with_off = compiled_code(tmp_path / "cache")
    without = start(VLLM_PLUGINS="other")
    for said in (off, without):
        assert said["tokens"] == plain
        assert "do not answer as the persona-axis plugin does" in said["refused"]
        assert "without a worker's word" in said["no_report"]
    assert len(with_off) == 2  # code of its own
    assert with_off > first
