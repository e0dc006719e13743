"""The operator itself: that compilers keep it, and that it looks up what it does when it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from layered_models import N_LAYERS, ROWS, Fused, Plain, a_model, inputs, streams
from small_policies import WIDTH, made
from torch import Tensor, nn

from persona_axis.serve.vllm import layers
from persona_axis.serve.vllm.bank import Bank
from persona_axis.serve.vllm.held import HeldModel, unpacked
from persona_axis.serve.vllm.keys import Ticket
from persona_axis.serve.vllm.layers import arm, vllm_layers


@pytest.fixture(autouse=True)
def forget_what_was_compiled() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("residual", [None, torch.ones(ROWS, WIDTH)])
def test_opcheck(residual: Tensor | None) -> None:
    number = layers.next_model()
    arm({}, lambda hidden, residual, layer: hidden.add_(layer))
    torch.library.opcheck(torch.ops.persona_axis.hold_.default, (inputs(), residual, 2, number))


@pytest.mark.parametrize("compiled", [False, True])
def test_an_exception_in_it_reaches_whoever_runs_the_model(compiled: bool) -> None:
    def run(hidden: Tensor, residual: Tensor | None, layer: int) -> None:
        if layer == 1 and failing:
            raise ArithmeticError("layer 1 fails")

    failing, model = False, a_model()
    arm(vllm_layers(model, N_LAYERS), run)
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    call(inputs())
    failing = True
    with pytest.raises(ArithmeticError, match="layer 1 fails"):
        call(inputs())


class Served:
    """A model with a bank, held, and one request of it."""

    def __init__(self, kind: Callable[[], nn.Module]) -> None:
        self.kind, self.model = kind, a_model(kind)
        blocks = vllm_layers(self.model, N_LAYERS)
        self.held = HeldModel(Bank(blocks, N_LAYERS, WIDTH, 2, 1, torch.device("cpu")), 16, 1)
        arm(blocks, self.held.run)
        self.fed, self.requests = 0, 0

    def start(self, seed: int | None) -> None:
        """A captured request with a prompt of one token, under a policy of this seed."""
        given = Ticket(capture=True)
        if seed is not None:
            given = Ticket("p", self.held.bank.load("p", made(seed, (0, 2), "add")).content_hash, 1.0, True)
        self.held.begin([f"{self.requests}"], [(f"{self.requests + 1}", given.to_dict(), 1)])
        self.fed, self.requests = 0, self.requests + 1

    def feed(self, call: Callable[[Tensor], Tensor], rows: int) -> Tensor:
        """Its next token, in the first of ``rows``."""
        self.held.fill([f"{self.requests}"], np.array([0, 1]), np.array([self.fed]), rows)
        self.fed += 1
        return call(inputs(rows, seed=rows))

    def wanted(self, seed: int | None, rows: int) -> list[Tensor]:
        def moved(layer: int, stream: Tensor) -> Tensor:
            stream = stream.clone()
            for part in made(seed, (0, 2), "add").interventions if seed is not None else ():
                if part.layer == layer:
                    stream[0] += part.shift @ part.V
            return stream

        return streams(a_model(self.kind), inputs(rows, seed=rows), moved)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", [Fused, Plain])
def test_compiled_code_looks_its_policy_up_when_it_runs(kind: type[nn.Module], backend: str) -> None:
    served, graphs = Served(kind), []

    def counted(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, example)

    call = torch.compile(served.model, fullgraph=True, backend=counted, dynamic=True)
    served.start(None)
    served.feed(call, 4)
    compiled = len(graphs)
    for seed in (None, 1, 2, None):
        served.start(seed)
        sums = torch.zeros(N_LAYERS, WIDTH)
        for rows in (4, 5, 9):
            wanted = served.wanted(seed, rows)
            torch.testing.assert_close(served.feed(call, rows), wanted[-1])
            if served.fed > 1:  # not of the prompt
                sums += torch.stack([stream[0] for stream in wanted])
        got = served.held.fetch(f"{served.requests}", 2)
        np.testing.assert_allclose(unpacked(got["activation_sum"]), sums, rtol=1e-5, atol=1e-5)
    assert len(graphs) == compiled > 0  # once, whatever is held
