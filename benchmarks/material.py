"""What the benchmarks work on: the embedded model, prompts and conversations from the catalog."""

from __future__ import annotations

from functools import cache
from itertools import cycle, islice

from persona_axis.catalog.catalog import load_catalog
from persona_axis.collect.plan import make_plan
from persona_axis.collect.rollouts import shard_requests
from persona_axis.model.engine import Request
from persona_axis.model.loading import ChatModel, load_model
from persona_axis.model.reading import Passage

ROLES = 36
QUESTIONS = 18


@cache
def embedded(dtype: str = "auto") -> ChatModel:
    """SmolLM2-135M-Instruct on the CPU, in the dtype that users get here."""
    return load_model("embedded", dtype=dtype, device="cpu")


def prompts(chat: ChatModel, count: int) -> list[Request]:
    """Role prompts as the demo's plan has them, three or four questions to a system prompt."""
    catalog = load_catalog()
    plan = make_plan(catalog.select_roles(ROLES), catalog.select_questions(QUESTIONS), catalog.default_prompts)
    return shard_requests(chat, list(plan.rows[-count:]))  # the default persona's, which share more, come first


def conversations(chat: ChatModel, count: int) -> list[Passage]:
    """Conversations of a system prompt and six turns, a span per turn."""
    catalog = load_catalog()
    roles = catalog.select_roles()
    questions = cycle(q.text for q in catalog.questions)
    made = []
    for i in range(count):
        role, other = roles[i % len(roles)], roles[(i + 1) % len(roles)]
        messages = [{"role": "system", "content": role.prompts[0]}]
        for answer in (role.description, other.prompts[1], other.description):
            messages += [
                {"role": "user", "content": " ".join(islice(questions, 2))},
                {"role": "assistant", "content": answer},
            ]
        tokens = chat.template.tokenise(messages)
        spans = tuple((s.start, s.end) for s in tokens.segments)
        made.append(Passage(f"conversation-{i}", tokens.token_ids, spans))
    return made
