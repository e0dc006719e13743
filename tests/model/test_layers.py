"""Finding the decoder blocks by structure, and hooks that come and go together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plain_reference import block_outputs, state_of
from torch import Tensor, nn

from persona_axis.errors import ModelError
from persona_axis.model.layers import check_layers, decoder_layers, hidden_of, main_device, tapped, text_decoder


class Blocks(nn.Module):
    """A stand-in for a Transformers model whose decoder holds the given lists of modules."""

    def __init__(self, n_layers: int, **lists: nn.Module) -> None:
        super().__init__()
        self.decoder = nn.Module()
        for name, module in lists.items():
            self.decoder.add_module(name, module)
        settings = SimpleNamespace(num_hidden_layers=n_layers)
        self.config = SimpleNamespace(get_text_config=lambda decoder: settings)

    def get_decoder(self) -> nn.Module:
        return self.decoder


def linears(n: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(2, 2) for _ in range(n))


class Expert(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.experts = linears(n)


class TestLocator:
    def test_architectures(self, tiny: Any, loop_arch: str) -> None:
        chat = tiny(loop_arch)
        assert chat.n_layers == len(chat.blocks) == 4
        assert len({type(block) for block in chat.blocks}) == 1
        # In order of execution, and nothing comes after the last but norm and head.
        hidden, logits = block_outputs(chat, [5, 6, 7])
        assert hidden.shape == (4, 3, chat.d_model)
        before: list[Tensor] = []
        handle = chat.blocks[1].register_forward_pre_hook(lambda block, args: before.append(args[0]))
        block_outputs(chat, [5, 6, 7])
        handle.remove()
        torch.testing.assert_close(before[0][0], hidden[0])
        assert logits.shape[0] == 3

    def test_other_lists_do_not_confuse(self) -> None:
        model = Blocks(3, layers=linears(3), adapters=linears(2))
        assert decoder_layers(model) is model.decoder.layers

    def test_as_many_experts_as_layers(self) -> None:
        model = Blocks(3, layers=nn.ModuleList(Expert(3) for _ in range(3)))
        assert decoder_layers(model) is model.decoder.layers

    def test_as_many_experts_as_layers_in_a_real_model(self, tiny: Any) -> None:
        for arch in ("qwen3_moe", "mixtral", "gpt_oss"):
            chat = tiny(arch)
            assert len(chat.blocks) == 4
            assert "Decoder" in type(chat.blocks[0]).__name__

    def test_several(self) -> None:
        model = Blocks(3, layers=linears(3), towers=linears(3))
        with pytest.raises(ModelError, match="several: layers, towers") as caught:
            decoder_layers(model)
        assert "layers_path" in str(caught.value)

    def test_names_that_start_alike_are_not_nested(self) -> None:
        model = Blocks(3, layers=linears(3), layers_b=linears(3))
        with pytest.raises(ModelError, match="several: layers, layers_b"):
            decoder_layers(model)

    def test_none(self) -> None:
        with pytest.raises(ModelError, match=r"3 decoder blocks.*none.*saw layers of 4"):
            decoder_layers(Blocks(3, layers=linears(4)))
        with pytest.raises(ModelError, match="no ModuleList at all"):
            decoder_layers(Blocks(3, layer=nn.Linear(2, 2)))

    def test_named(self) -> None:
        model = Blocks(3, layers=linears(3), towers=linears(3))
        assert decoder_layers(model, "decoder.towers") is model.decoder.towers
        with pytest.raises(ModelError, match=r"no module at layers_path 'decoder\.nothing'"):
            decoder_layers(model, "decoder.nothing")
        with pytest.raises(ModelError, match="is a Linear, not a ModuleList"):
            decoder_layers(model, "decoder.towers.0")

    def test_a_vision_tower_of_as_many_blocks(self, tiny: Any) -> None:
        for arch in ("gemma3_vision", "llava"):
            chat = tiny(arch)
            assert sum(isinstance(m, nn.ModuleList) and len(m) == 4 for m in chat.model.modules()) == 2
            assert "DecoderLayer" in type(chat.blocks[0]).__name__
            assert text_decoder(chat.model).layers is chat.blocks

    def test_a_block_used_for_several_layers(self) -> None:
        model = Blocks(3, layers=nn.ModuleList([nn.Linear(2, 2)] * 3))
        for path in (None, "decoder.layers"):
            with pytest.raises(ModelError, match="share one block"):
                decoder_layers(model, path)

    def test_main_device(self, tiny: Any) -> None:
        assert main_device(tiny("llama").model) == torch.device("cpu")


class TestCheckLayers:
    def test_sorted_and_distinct(self) -> None:
        assert check_layers([3, 1, 3], 4) == (1, 3)
        assert check_layers(None, 3) == (0, 1, 2)

    @pytest.mark.parametrize("wrong", [[4], [-1], [0, 9], []])
    def test_wrong(self, wrong: list[int]) -> None:
        with pytest.raises(ModelError, match="layers 0 to 3"):
            check_layers(wrong, 4)


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Paired(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x + 1, "cache"


class Wrapped(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"hidden": x}


class TestTapped:
    def test_sees_and_leaves_alone(self) -> None:
        seen: list[tuple[int, Tensor]] = []
        blocks = [Plain(), Paired()]
        x = torch.zeros(1, 2, 3)
        with tapped(blocks, lambda i, hidden: seen.append((i, hidden.clone()))):
            assert torch.equal(blocks[0](x), x + 1)
            assert torch.equal(blocks[1](x + 1)[0], x + 2)
            assert blocks[1](x)[1] == "cache"
        assert [(i, float(h[0, 0, 0])) for i, h in seen] == [(0, 1), (1, 2), (1, 1)]
        assert not any(block._forward_hooks for block in blocks)

    def test_replaces(self) -> None:
        blocks = [Plain(), Paired()]
        x = torch.zeros(1, 2, 3)
        with tapped(blocks, lambda i, hidden: hidden * 10):
            assert torch.equal(blocks[0](x), x + 10)
            assert torch.equal(blocks[1](x)[0], x + 10)
            assert blocks[1](x)[1] == "cache"
        assert torch.equal(blocks[0](x), x + 1)

    def test_later_hooks_see_what_earlier_ones_changed(self) -> None:
        block, seen = Plain(), []
        with tapped([block], lambda i, hidden: hidden * 10), tapped([block], lambda i, h: seen.append(h.mean().item())):
            block(torch.zeros(1, 2, 3))
        assert seen == [10]

    def test_all_or_none(self) -> None:
        blocks = [Plain(), Plain(), object()]

        def enter() -> None:
            with tapped(blocks, lambda i, hidden: None):  # type: ignore[arg-type]
                pytest.fail("entered with a block that cannot be hooked")

        with pytest.raises(AttributeError):
            enter()
        assert not any(block._forward_hooks for block in blocks[:2])

    def test_removed_after_an_exception(self, tiny: Any) -> None:
        chat = tiny("llama")
        before = state_of(chat)

        def fail(i: int, hidden: Tensor) -> None:
            raise ZeroDivisionError

        def run() -> None:
            with tapped(chat.blocks, fail):
                block_outputs(chat, [1, 2])

        with pytest.raises(ZeroDivisionError):
            run()
        assert state_of(chat) == before

    def test_an_unknown_output(self) -> None:
        with (
            tapped([Wrapped()], lambda i, hidden: None) as _,
            pytest.raises(ModelError, match=r"here returned dict where \[batch, tokens, d_model\]"),
        ):
            hidden_of({"hidden": torch.zeros(1)}, "here")
        block = Wrapped()
        with tapped([block], lambda i, hidden: None), pytest.raises(ModelError, match="Wrapped"):
            block(torch.zeros(1, 2, 3))
        with pytest.raises(ModelError, match=r"\(2, 3\)"):
            hidden_of((torch.zeros(2, 3), None), "here")
