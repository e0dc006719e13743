"""Capability: tasks of EleutherAI's lm-evaluation-harness, run on the model as it is now.

Contract:

1. lm-eval gets the very model that is passed: ``with held(chat, policy): evaluate_tasks(chat, ...)`` measures the held
   model. Nothing is loaded again; model and tokenizer are the same afterwards.
2. Prompts are what the other stages would write: the model's chat template with nothing in front of it, and a system
   message folded into the first user turn where the template has no system role.
3. A task counts by one metric: the first in the task's own list, after the first of the task's filters.
4. A task that cannot be run is an error that names it, raised before the model computes anything.
"""

from __future__ import annotations

import copy
import difflib
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from persona_axis.errors import EvaluationError, MissingDependency, TemplateError, UsageError
from persona_axis.model.loading import ChatModel

DRAWS = 1000  # bootstrap draws for the metrics whose standard error has no formula: F1, perplexity, BLEU
Z_95 = 1.959964  # of the normal distribution, two-sided


@dataclass(frozen=True, slots=True)
class TaskScore:
    """What a model scores on one task, or on a group of tasks that lm-eval averages."""

    task: str
    metric: str  # as lm-eval names it, with the filter where the task names one: "exact_match,strict-match"
    value: float
    stderr: float | None  # None: a single document, or a metric for which lm-eval has none
    n: int  # documents
    higher_is_better: bool | None  # None: the task does not say


@dataclass(frozen=True, slots=True)
class RelativeScore:
    """Held / plain on one task; 1 is unchanged."""

    task: str
    metric: str
    value: float
    low: float | None  # the ends of the 95% interval; None when a standard error is missing
    high: float | None


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What one of the names asked for stands for."""

    objects: tuple[Any, ...]  # lm-eval's Task or Group, for simple_evaluate
    leaves: Mapping[str, Any]  # every single task in it
    reported: tuple[str, ...]  # whose scores are handed back
    averaged: bool  # by lm-eval, as a group


def evaluate_tasks(
    chat: ChatModel,
    tasks: Sequence[str],
    limit: int | None,
    seed: int,
    include_path: Path | None = None,
    apply_chat_template: bool = True,
    batch_size: int = 8,
) -> dict[str, TaskScore]:
    """Score the model, under whatever ``held``, ``steer`` or ``cap`` block is entered.

    Args:
        chat: the model; lm-eval uses it in place.
        tasks: lm-eval's names of tasks, groups and tags. A group that lm-eval averages gives one score, under its own
            name; a tag, or a group without an average, gives one for each of its tasks.
        limit: the first so many documents of every task; None is all of them.
        seed: of few-shot examples and of tasks that sample. Seeds the global generators of Python, NumPy and torch.
        include_path: a folder of your own task files (YAML), which come before lm-eval's of the same name.
        apply_chat_template: ask as a user turn, with few-shot examples as earlier turns. False gives the bare text,
            as to a base model.
        batch_size: prompts at a time.

    Raises:
        MissingDependency: lm-eval is not installed, or a package that a task needs is not.
        UsageError: an unknown or repeated task, one that this model cannot be given, a bad number, no such folder.
        TemplateError: the chat template refuses a task's conversation.
        EvaluationError: a task's documents cannot be had, or its file is broken.
    """
    _check(tasks, limit, seed, include_path, batch_size)
    require_lm_eval()
    import lm_eval

    manager = _manager(tasks, include_path)
    with redirect_stdout(sys.stderr):  # stdout is data, and tasks print
        chosen = {name: _load(manager, name) for name in tasks}
    _refuse_repeats(chosen)
    thinks = apply_chat_template and _thinks(chat)
    for choice in chosen.values():
        for name, task in choice.leaves.items():
            _refuse_impossible(name, task, thinks)
    with redirect_stdout(sys.stderr), _bootstrap_in_this_process():
        results = lm_eval.simple_evaluate(
            model=_language_model(chat, batch_size, apply_chat_template, thinks),
            tasks=[task for choice in chosen.values() for task in choice.objects],
            task_manager=manager,
            limit=limit,
            bootstrap_iters=DRAWS,
            log_samples=False,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return {name: _score(name, results, c.averaged) for c in chosen.values() for name in c.reported}


def relative_scores(plain: Mapping[str, TaskScore], held: Mapping[str, TaskScore]) -> dict[str, RelativeScore | None]:
    """Held / plain for every task; None where plain is 0.

    With ``r = h / p``, the 95% interval is ``r +- 1.96 sqrt(se_h^2 + r^2 se_p^2) / |p|`` (the delta method, as if the
    two were independent). On the same documents they usually agree more than that, so the interval errs on the wide
    side. A standard error of 0, as when every document is right, is taken at its word. For a metric that is better
    when lower, less than 1 is better.

    Raises:
        UsageError: not the same tasks, metrics or numbers of documents.
    """
    if plain.keys() != held.keys():
        raise UsageError(f"Scores of different tasks: {', '.join(sorted(plain.keys() ^ held.keys()))}.")
    return {name: _relative(plain[name], held[name]) for name in plain}


def _relative(plain: TaskScore, held: TaskScore) -> RelativeScore | None:
    if (plain.metric, plain.n) != (held.metric, held.n):
        raise UsageError(
            f"Task {plain.task}: {plain.metric} on {plain.n} documents against {held.metric} on {held.n}. Evaluate "
            "both with the same limit."
        )
    if plain.value == 0:
        return None
    r = held.value / plain.value
    if plain.stderr is None or held.stderr is None:
        return RelativeScore(plain.task, plain.metric, r, None, None)
    half = Z_95 * math.hypot(held.stderr, r * plain.stderr) / abs(plain.value)
    return RelativeScore(plain.task, plain.metric, r, r - half, r + half)


def require_lm_eval() -> None:
    """Raise ``MissingDependency`` unless lm-eval can be imported (which takes seconds: not for --help)."""
    try:
        import lm_eval.models.huggingface
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            f"Evaluations need lm-evaluation-harness ({error}). Install it: pip install 'persona-axis[evals]'"
        ) from error


def _check(tasks: Sequence[str], limit: int | None, seed: int, include_path: Path | None, batch_size: int) -> None:
    if isinstance(tasks, str) or not tasks:
        raise UsageError(f"tasks must be a list of names such as ['gsm8k'], not {tasks!r}.")
    if repeated := sorted({name for name in tasks if list(tasks).count(name) > 1}):
        raise UsageError(f"Named twice: {', '.join(repeated)}.")
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1 document, not {limit}; leave it out for all.")
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, not {batch_size}.")
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed must be from 0 to 2**32 - 1, not {seed}.")
    if include_path is not None and not include_path.is_dir():
        raise UsageError(f"{include_path} is not a folder with task files.")


# ---- tasks ------------------------------------------------------------------------------------------------------


def _manager(tasks: Sequence[str], include_path: Path | None) -> Any:
    """lm-eval's index with every name in it."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        # Reading lm-eval's own files, some fourteen thousand, takes seconds; single tasks refer to none of them.
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):
            return own
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    known = manager.all_tasks
    if unknown := [name for name in tasks if name not in known]:
        raise UsageError(" ".join(_unknown(name, known) for name in unknown) + _where(include_path))
    return manager


def _unknown(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.6)
    return f"Unknown task {name!r}" + (f"; close to {', '.join(close)}." if close else ".")


def _where(include_path: Path | None) -> str:
    if include_path is None:
        return " `lm-eval ls tasks` lists all names; a folder of your own task files is passed as include_path."
    return f" `lm-eval ls tasks` lists all names. In {include_path} lm-eval leaves out a YAML file that it cannot read."


def _load(manager: Any, name: str) -> _Chosen:
    """A task with its documents, or all of a group's or tag's."""
    try:
        found = manager.load([name])
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"Task {name} needs the Python package {error.name}, which is not installed. lm-eval's extras hold those "
            "of its tasks: pip install 'lm-eval[ifeval,math]'"
        ) from error
    except OSError as error:  # what datasets and the Hub's client raise, offline or refused
        raise EvaluationError(
            f"Task {name}: its documents cannot be loaded: {_one_line(error)}. lm-eval downloads them from the Hugging "
            "Face Hub on first use and keeps them in HF_DATASETS_CACHE; for local files see include_path."
        ) from error
    except Exception as error:  # a task file may hold any code, and its documents come from anywhere
        raise EvaluationError(f"Task {name} cannot be loaded: {type(error).__name__}: {_one_line(error)}.") from error
    leaves = found["tasks"]
    group = found.get("groups", {}).get(name)
    if group is None:
        return _Chosen(tuple(leaves.values()), leaves, tuple(leaves), averaged=False)
    if group.has_aggregation:
        return _Chosen((group,), leaves, (name,), averaged=True)
    return _Chosen((group,), leaves, tuple(leaves), averaged=False)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _refuse_repeats(chosen: Mapping[str, _Chosen]) -> None:
    owner: dict[str, str] = {}
    for name, choice in chosen.items():
        for leaf in choice.leaves:
            if leaf in owner:
                raise UsageError(f"Task {leaf} is in {owner[leaf]} and in {name}: name one of them.")
            owner[leaf] = name


def _refuse_impossible(name: str, task: Any, thinks: bool) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise UsageError(f"Task {name} runs code that the model writes, on this machine. It is refused.")
    if getattr(task, "MULTIMODAL", False):
        raise UsageError(f"Task {name} shows the model images or sound; it reads text only.")
    if thinks and task.OUTPUT_TYPE != "generate_until":
        raise UsageError(
            f"Task {name} scores given answers ({task.OUTPUT_TYPE}), and this model's turn opens with thinking: the "
            "answers would be scored as thoughts. Load the model with thinking off, or choose a task that generates."
        )


# ---- the model --------------------------------------------------------------------------------------------------


def _thinks(chat: ChatModel) -> bool:
    """Whether the model's turns begin with thoughts."""
    if chat.think_end_id is None:
        return False
    prompt = chat.template.prompt_ids([{"role": "user", "content": "Hello"}])
    return chat.template.thinking or chat.opens_thinking(prompt)


def _language_model(chat: ChatModel, batch_size: int, apply_chat_template: bool, thinks: bool) -> Any:
    """lm-eval's adapter around the loaded model."""
    from jinja2.exceptions import TemplateError as JinjaError
    from lm_eval.models.huggingface import HFLM

    class LoadedModel(HFLM):
        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            # HFLM leaves a system message out where the template has no system role.
            turns = chat.template.fold_system(chat_history)
            try:
                return str(super().apply_chat_template(turns, add_generation_prompt))
            except JinjaError as error:
                raise TemplateError(f"The chat template refuses a task's conversation: {error}") from error

        def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
            # Without a cache, a policy for generated tokens only refuses this forward; with one it would take the
            # given answer for a prompt and hold nothing.
            with torch.no_grad():
                return self.model(inps, use_cache=False).logits  # [batch, tokens, vocabulary]

    tokenizer = copy.deepcopy(chat.tokenizer)  # lm-eval sets its padding
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = min(chat.stop_ids, default=0)
    with _without_warnings("lm_eval.models.huggingface"):  # that the model is loaded already
        return LoadedModel(
            pretrained=chat.model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            add_bos_token=False if apply_chat_template else None,  # a template writes its own; None is the tokenizer's
            chat_template_args=chat.template.kwargs,
            think_end_token=chat.think_end_id if thinks else None,
        )


@contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _bootstrap_in_this_process() -> Iterator[None]:
    """lm-eval would fork a process that holds a model and its threads."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


# ---- scores -----------------------------------------------------------------------------------------------------


def _score(name: str, results: Mapping[str, Any], averaged: bool) -> TaskScore:
    numbers = results["results"][name]
    better = results["higher_is_better"].get(name, {})
    keys = [key for key in numbers if "," in key and not key.split(",")[0].endswith("_stderr")]
    if not keys:
        raise EvaluationError(f"Task {name} reports no metric.")
    # A task's own order; a group lists what it averages in its own.
    order = {} if averaged else {metric: place for place, metric in enumerate(better)}
    key = min(keys, key=lambda k: order.get(k.split(",")[0], len(order)))
    metric, filtered = key.split(",", 1)
    stderr = numbers.get(f"{metric}_stderr,{filtered}", "N/A")
    return TaskScore(
        task=name,
        metric=metric if filtered == "none" else key,
        value=float(numbers[key]),
        stderr=None if stderr == "N/A" else float(stderr),
        n=int(numbers["sample_len"]),
        higher_is_better=better.get(metric),
    )
