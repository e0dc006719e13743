"""What a run can be asked for, checked when it is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

EMBEDDED = "embedded"


class RunSettings(BaseModel):
    """All options of :func:`persona_axis.run`. Unknown names and values out of range are refused.

    Sampling follows the paper (T 0.7, top-p 0.9); lengths are tokens, prices per million tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = EMBEDDED
    out: Path
    # What is asked
    catalog: Path | None = None
    roles: str | None = None
    questions: str | None = None
    prompts: tuple[int, ...] | None = None
    budget: int | None = Field(None, ge=1)
    default_prompts: Path | None = None
    own_questions: bool = False
    design: Literal["rotated", "crossed"] = "rotated"
    # How it is answered
    max_tokens: int = Field(512, ge=2)  # the last token of a cut reply does not count
    temperature: float = Field(0.7, ge=0)
    top_p: float = Field(0.9, gt=0, le=1)
    seed: int = 0
    # Who judges
    judge: str = "likelihood"
    price: tuple[float, float] | None = None
    judge_connections: int = Field(16, ge=1)
    judge_requests_per_minute: float | None = Field(None, gt=0)
    # What is fitted
    filter: Literal["auto", "none", "expressed", "score>=2", "score==3"] = "auto"
    min_count: int = Field(10, ge=1)
    estimator: Literal["paired", "paper"] = "paired"
    layers: tuple[int, ...] | None = None
    layer: int | None = None
    # Where it runs
    engine: str = "loop"  # ours, or one found by entry point: vllm
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    revision: str | None = None
    chat_template: Path | None = None
    trust_remote_code: bool = False
    batch_tokens: int | None = Field(None, ge=64)
    keep: str | None = None

    @field_validator("keep")
    @classmethod
    def _keep(cls, value: str | None) -> str | None:
        if value is None or value in ("all", "none") or (value.startswith("sample:") and value[7:].isdecimal()):
            return value
        raise ValueError("expected all, none or sample:N")

    @field_validator("chat_template")
    @classmethod
    def _chat_template(cls, value: Path | None) -> Path | None:
        if value is not None:
            try:
                value.read_text()
            except (OSError, UnicodeDecodeError) as e:
                raise ValueError(f"cannot read {value} ({e})") from e
        return value

    @property
    def keep_all(self) -> bool:
        return self.keep in (None, "all")

    @property
    def sampled_activations(self) -> int:
        """Activations kept per role when not all are."""
        return int(self.keep[7:]) if self.keep and self.keep.startswith("sample:") else 0

    def generation(self) -> dict[str, Any]:
        """What decides the rollouts beside the plan, which holds every text: a run folder made with other values is
        refused."""
        template = self.chat_template.read_text() if self.chat_template else None
        return {
            "model": self.model,
            "revision": self.revision,
            "dtype": self.dtype,
            "chat_template": template,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "layers": list(self.layers) if self.layers else None,
            "keep": self.keep or "all",
            **({"engine": self.engine} if self.engine != "loop" else {}),  # runs from before engines had names go on
        }


class CalibrationSettings(BaseModel):
    """All options of :func:`persona_axis.calibrate`. Unknown names and values out of range are refused.

    Percentiles are toward the Assistant; the reference counts along the negated axis, so its "p0.25" is 75 here.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # What is tried
    layers: tuple[int, ...] | None = None  # that windows may cover; from a third of the model's depth on by default
    widths: tuple[int, ...] | None = None  # layers of a window; an eighth and a quarter of the model by default
    stride: int | None = Field(None, ge=1)  # from one window to the next; half of its width by default
    percentiles: tuple[float, ...] = (50, 75)
    positions: Literal["all", "reply", "decode"] = "all"
    # What it is tried on, at most, in each half
    prompts: int = Field(288, ge=4)  # role prompts
    neutral_replies: int = Field(96, ge=2)
    neutral: Path | None = None  # a user's own conversations instead of the run's neutral replies
    # What is chosen
    max_perplexity: float = Field(1.015, gt=1, allow_inf_nan=False)
    # What else the chosen policy is put to: lm-eval's tasks
    tasks: tuple[str, ...] = ()
    task_limit: int | None = Field(None, ge=1)  # documents of each task
    task_folder: Path | None = None  # of the user's own task files
    # Where it runs
    device: str = "auto"
    batch_tokens: int | None = Field(None, ge=64)

    @field_validator("widths", "percentiles")
    @classmethod
    def _some(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and not value:
            raise ValueError("expected at least one")
        return value

    @field_validator("widths")
    @classmethod
    def _widths(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value and min(value) < 1:
            raise ValueError("a window has at least one layer")
        return value

    @field_validator("percentiles")
    @classmethod
    def _percentiles(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < p < 100 for p in value):
            raise ValueError("percentiles lie between 0 and 100, not at them")
        return value
