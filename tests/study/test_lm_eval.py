"""lm-eval's tasks on a plain and on a held model, against plain Transformers code."""

from __future__ import annotations

import builtins
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from persona_axis.errors import MissingDependency, ModelError, PersonaAxisError, TemplateError, UsageError
from persona_axis.model.loading import ChatModel
from persona_axis.steering import interventions
from persona_axis.steering.hooks import held
from persona_axis.steering.policy import Policy
from persona_axis.study.lm_eval import TaskScore, evaluate_tasks, relative_scores

Tiny = Callable[..., ChatModel]

LETTERS = "ABCD"
N = 20
LAST = 3  # decoder block
CHOICE = """
task: own_choice
tag: own_tag
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: gold
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list:
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
WRITE = """
task: own_write
tag: own_tag
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/write.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: generate_until
description: "{description}"
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs: {{until: ["."], max_gen_toks: 4, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
filter_list:
  - {{name: first, filter: [{{function: take_first}}]}}
  - {{name: again, filter: [{{function: take_first}}]}}
"""
GROUP = """
group: own_group
task: [own_choice]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
"""
DOWNLOAD = "task: own_download\ndataset_path: nobody/nothing\ntest_split: test\ndoc_to_text: x\ndoc_to_target: y\n"


@pytest.fixture
def documents() -> list[dict[str, Any]]:
    draw = random.Random(0)
    return [
        {"question": f"{draw.randrange(100)} or {i}?", "choices": list(LETTERS), "gold": draw.randrange(len(LETTERS))}
        for i in range(N)
    ]


@pytest.fixture
def folder(tmp_path: Path, documents: list[dict[str, Any]]) -> Path:
    """Tasks of our own: one that scores given answers, one that generates, a group and one without documents."""
    pytest.importorskip("lm_eval", reason="lm_eval is missing: pip install 'persona-axis[evals]'")
    _lines(tmp_path / "choice.jsonl", documents)
    _lines(tmp_path / "write.jsonl", [{"question": d["question"], "answer": "AAAA"} for d in documents[:6]])
    (tmp_path / "choice.yaml").write_text(CHOICE.format(folder=tmp_path))
    (tmp_path / "write.yaml").write_text(WRITE.format(folder=tmp_path, description=""))
    (tmp_path / "group.yaml").write_text(GROUP)
    (tmp_path / "download.yaml").write_text(DOWNLOAD)
    return tmp_path


def _lines(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def toward(chat: ChatModel, text: str) -> Policy:
    """Pushes the last block's output so far toward one token's row of the LM head that no other can be chosen."""
    (token,) = chat.tokenizer.encode(text)
    return Policy((interventions.add(LAST, chat.model.lm_head.weight[token], 1e4),))


@torch.no_grad()
def accuracy(chat: ChatModel, documents: Sequence[dict[str, Any]]) -> float:
    """By plain Transformers code: the answer with the highest log-probability after the rendered question."""
    right = 0
    for document in documents:
        prompt = chat.template.prompt_ids([{"role": "user", "content": document["question"]}])
        logits = chat.model(torch.tensor([prompt]), use_cache=False).logits[0, -1]
        answers = [chat.tokenizer.encode(choice)[0] for choice in document["choices"]]
        right += int(logits[answers].argmax()) == document["gold"]
    return right / len(documents)


def test_given_answers_are_scored_on_the_model_as_it_is(
    tiny: Tiny, folder: Path, documents: list[dict[str, Any]]
) -> None:
    chat = tiny()
    plain = evaluate_tasks(chat, ["own_choice"], None, 0, folder)["own_choice"]
    with held(chat, toward(chat, "B")):
        expected_held = accuracy(chat, documents)
        steered = evaluate_tasks(chat, ["own_choice"], None, 0, folder)["own_choice"]
    p = accuracy(chat, documents)
    stderr = math.sqrt(p * (1 - p) / (N - 1))
    assert plain == TaskScore("own_choice", "acc_norm", pytest.approx(p), pytest.approx(stderr), N, True)
    assert steered.value == expected_held == sum(d["gold"] == 1 for d in documents) / N
    assert steered.value != plain.value
    assert evaluate_tasks(chat, ["own_choice"], None, 0, folder)["own_choice"] == plain  # and not after it


def test_replies_are_generated_by_the_model_as_it_is(tiny: Tiny, folder: Path) -> None:
    chat = tiny()
    plain = evaluate_tasks(chat, ["own_write"], None, 0, folder)["own_write"]
    with held(chat, toward(chat, "A")):
        steered = evaluate_tasks(chat, ["own_write"], None, 0, folder)["own_write"]
    assert plain == TaskScore("own_write", "exact_match,first", 0.0, 0.0, 6, True)
    assert steered == TaskScore("own_write", "exact_match,first", 1.0, 0.0, 6, True)


def test_bare_text_has_no_template(tiny: Tiny, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = tiny()
    for apply in (True, False):
        prompts = _generated(chat, folder, monkeypatch, apply_chat_template=apply)
        assert all(("<|im_start|>user\n" in text) == apply for text in prompts)


def test_a_description_reaches_a_model_without_system_role(
    tiny: Tiny, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "write.yaml").write_text(WRITE.format(folder=folder, description="Be brief."))
    prompts = _generated(tiny(template="no_system"), folder, monkeypatch)
    assert all(text.startswith("<|im_start|>user\nBe brief.\n\n") for text in prompts)


def _generated(chat: ChatModel, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[str]:
    """The prompts that reach ``generate``."""
    seen: list[str] = []
    generate = chat.model.generate

    def keep(input_ids: torch.Tensor, attention_mask: torch.Tensor, **rest: Any) -> Any:
        seen.extend(
            chat.tokenizer.decode(row[mask.bool()]) for row, mask in zip(input_ids, attention_mask, strict=True)
        )
        return generate(input_ids=input_ids, attention_mask=attention_mask, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(chat.model, "generate", keep)
        evaluate_tasks(chat, ["own_write"], None, 0, folder, **options)
    assert len(seen) == 6
    return seen


def test_limit_takes_the_first_documents(tiny: Tiny, folder: Path, documents: list[dict[str, Any]]) -> None:
    score = evaluate_tasks(tiny(), ["own_choice"], 7, 0, folder)["own_choice"]
    assert (score.n, score.value) == (7, pytest.approx(accuracy(tiny(), documents[:7])))
    assert evaluate_tasks(tiny(), ["own_choice"], 1, 0, folder)["own_choice"].stderr is None


def test_model_and_tokenizer_stay_as_they_were(tiny: Tiny, folder: Path) -> None:
    chat = tiny(fresh=True)
    chat.tokenizer.pad_token = None
    before = {name: p.clone() for name, p in chat.model.state_dict().items()}
    evaluate_tasks(chat, ["own_choice", "own_write"], 2, 0, folder)
    assert chat.tokenizer.pad_token is None
    assert all(torch.equal(p, before[name]) for name, p in chat.model.state_dict().items())


def test_nothing_is_printed_to_stdout(tiny: Tiny, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The Matthews coefficient has no formula for its standard error; lm-eval announces that it bootstraps.
    text = CHOICE.format(folder=folder).replace("acc_norm, aggregation: mean", "mcc, aggregation: matthews_corrcoef")
    (folder / "choice.yaml").write_text(text.replace('"{{question}}"', "!function code.text"))
    (folder / "code.py").write_text("print('hello')\n\n\ndef text(document):\n    return document['question']\n")
    score = evaluate_tasks(tiny(), ["own_choice"], None, 0, folder)["own_choice"]
    assert (score.metric, score.stderr is not None) == ("mcc", True)
    out, err = capsys.readouterr()
    assert (out, "hello" in err) == ("", True)


def test_documents_that_cannot_be_had_name_the_task(tiny: Tiny, folder: Path) -> None:
    with pytest.raises(PersonaAxisError, match=r"Task own_download: its documents cannot be loaded: .*nobody/nothing"):
        evaluate_tasks(tiny(), ["own_choice", "own_download"], None, 0, folder)


def test_a_broken_task_is_named(tiny: Tiny, folder: Path) -> None:
    (folder / "choice.yaml").write_text(CHOICE.format(folder=folder).replace("multiple_choice", "telepathy"))
    with pytest.raises(PersonaAxisError, match=r"Task own_choice cannot be loaded: .*telepathy"):
        evaluate_tasks(tiny(), ["own_choice"], None, 0, folder)


def test_unknown_tasks_are_refused_with_close_names(tiny: Tiny, folder: Path) -> None:
    """Seconds: an unknown name is looked for in the thousands of task files that come with lm-eval."""
    close = r"Unknown task 'own_choise'; close to own_choice.* Unknown task 'gsm8kk'; close to .*gsm8k"
    with pytest.raises(UsageError, match=close):
        evaluate_tasks(tiny(), ["own_choise", "own_write", "gsm8kk"], None, 0, folder)


def test_groups_and_tags(tiny: Tiny, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    quick = partial(lm_eval.tasks.TaskManager, include_defaults=False)  # without lm-eval's own, as above
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", quick)
    chat = tiny()
    single = evaluate_tasks(chat, ["own_choice"], None, 0, folder)["own_choice"]
    averaged = TaskScore("own_group", "acc", single.value, single.stderr, N, True)
    assert evaluate_tasks(chat, ["own_group"], None, 0, folder) == {"own_group": averaged}
    tagged = evaluate_tasks(chat, ["own_tag"], None, 0, folder)
    assert (tagged["own_choice"], set(tagged)) == (single, {"own_choice", "own_write"})
    with pytest.raises(UsageError, match="Task own_choice is in own_group and in own_tag"):
        evaluate_tasks(chat, ["own_group", "own_tag"], None, 0, folder)


def test_a_package_that_a_task_needs_is_named(tiny: Tiny, folder: Path) -> None:
    (folder / "code.py").write_text("import no_such_package\n\n\ndef text(document):\n    return ''\n")
    own = CHOICE.format(folder=folder).replace('"{{question}}"', "!function code.text")
    (folder / "choice.yaml").write_text(own)
    with pytest.raises(MissingDependency, match="Task own_choice needs the Python package no_such_package"):
        evaluate_tasks(tiny(), ["own_choice"], None, 0, folder)


def test_code_that_the_model_writes_is_not_run(tiny: Tiny, folder: Path) -> None:
    (folder / "write.yaml").write_text(WRITE.format(folder=folder, description="") + "unsafe_code: true\n")
    with pytest.raises(UsageError, match="own_write runs code that the model writes"):
        evaluate_tasks(tiny(), ["own_write"], None, 0, folder)


def test_thinking_turns_refuse_given_answers(tiny: Tiny, folder: Path) -> None:
    for chat in (tiny(template="thinking", thinking=True), tiny(template="opens_thinking")):
        with pytest.raises(UsageError, match="own_choice scores given answers"):
            evaluate_tasks(chat, ["own_choice"], None, 0, folder)
        assert evaluate_tasks(chat, ["own_write"], 2, 0, folder)["own_write"].n == 2
    assert evaluate_tasks(tiny(template="thinking"), ["own_choice"], 2, 0, folder)["own_choice"].n == 2


def test_a_template_that_refuses_is_an_error(tiny: Tiny, folder: Path) -> None:
    chat = tiny(fresh=True)
    refusal = "{% if ' or ' in messages[0]['content'] %}{{ raise_exception('no choices') }}{% endif %}"
    chat.tokenizer.chat_template = refusal + chat.tokenizer.chat_template
    with pytest.raises(TemplateError, match="no choices"):
        evaluate_tasks(chat, ["own_choice"], 2, 0, folder)


def test_a_policy_for_generated_tokens_never_leaves_given_answers_unheld(tiny: Tiny, folder: Path) -> None:
    chat = tiny()
    with held(chat, replace(toward(chat, "A"), positions="decode")):
        with pytest.raises(ModelError, match="decode"):
            evaluate_tasks(chat, ["own_choice"], 2, 0, folder)
        assert evaluate_tasks(chat, ["own_write"], 2, 0, folder)["own_write"].n == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": []}, "list of names"),
        ({"tasks": "gsm8k"}, "list of names"),
        ({"tasks": ["gsm8k", "gsm8k"]}, "Named twice: gsm8k"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": -1}, "seed must be"),
        ({"include_path": Path("no/such/folder")}, "is not a folder"),
    ],
)
def test_bad_arguments(tiny: Tiny, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"tasks": ["own_choice"], "limit": None, "seed": 0} | change
    with pytest.raises(UsageError, match=message):
        evaluate_tasks(tiny(), **arguments)


def score(value: float, stderr: float | None = 0.05, **changes: Any) -> TaskScore:
    fields = {"task": "t", "metric": "acc", "value": value, "stderr": stderr, "n": 100, "higher_is_better": True}
    return TaskScore(**fields | changes)


def test_relative_scores_hold_their_formula() -> None:
    result = relative_scores({"t": score(0.5, 0.04)}, {"t": score(0.4, 0.03)})["t"]
    assert result is not None
    half = 1.959964 * math.sqrt(0.03**2 + 0.8**2 * 0.04**2) / 0.5
    assert (result.value, result.low, result.high) == pytest.approx((0.8, 0.8 - half, 0.8 + half))


def test_the_interval_covers_the_ratio_as_often_as_it_says() -> None:
    torch.manual_seed(0)
    n, p, h, draws = 500, 0.6, 0.5, 2000
    hits = 0
    for a, b in torch.distributions.Binomial(n, torch.tensor([p, h])).sample((draws,)).div(n).tolist():
        plain, steered = (score(x, math.sqrt(x * (1 - x) / (n - 1))) for x in (a, b))
        result = relative_scores({"t": plain}, {"t": steered})["t"]
        assert result is not None
        assert result.low is not None
        assert result.high is not None
        hits += result.low <= h / p <= result.high
    assert hits / draws == pytest.approx(0.95, abs=0.015)


def test_relative_scores_without_a_ratio_or_an_interval() -> None:
    assert relative_scores({"t": score(0.0)}, {"t": score(0.4)}) == {"t": None}
    result = relative_scores({"t": score(0.5, None)}, {"t": score(0.4)})["t"]
    assert result is not None
    assert (result.value, result.low, result.high) == (0.8, None, None)


@pytest.mark.parametrize("held", [{"u": score(0.5)}, {"t": score(0.5, n=99)}, {"t": score(0.5, metric="f1")}])
def test_relative_scores_compare_like_with_like(held: dict[str, TaskScore]) -> None:
    with pytest.raises(UsageError):
        relative_scores({"t": score(0.5)}, held)


def test_without_lm_eval_the_extra_is_named(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def no_lm_eval(name: str, *rest: Any) -> Any:
        if name.startswith("lm_eval"):
            raise ImportError("No module named 'lm_eval'")
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_lm_eval)
    with pytest.raises(MissingDependency, match=r"pip install 'persona-axis\[evals\]'"):
        evaluate_tasks(tiny(), ["gsm8k"], None, 0)
