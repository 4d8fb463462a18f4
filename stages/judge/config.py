"""The `judge` section of a recipe: which models, which questions, and who judges their answers.

Light on purpose: imports no torch, openai or alpaca_eval.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.base import Config, Need, UserError
from stages.evaluation.config import EvaluationStage, require_vllm
from stages.judge.questions import Estimate, estimate_alpaca_eval, estimate_mt_bench
from stages.models.model_folder import REMOTE_CODE, check_context, check_model


class MTBench(Config):
    """MT-Bench (Zheng et al., NeurIPS 2023): questions of two turns, each answer graded from 1 to 10."""

    questions: str
    """A file of rows {"question_id", "category", "turns": [first, second]}."""
    references: str
    """A file of rows {"question_id", "choices": [{"turns": [...]}]}: right answers for math, reasoning and coding."""
    prompts: str
    """A file of the judge's prompts, by the names single-v1, single-math-v1 and both with -multi-turn."""


class AlpacaEval(Config):
    """AlpacaEval (Li et al., 2023; length-controlled: Dubois et al., 2024): how often an answer is preferred."""

    instructions: str
    """A file of rows {"instruction", "output", "generator"}: what is asked, and the answers to compare with."""
    annotator: str = "weighted_alpaca_eval_gpt4_turbo"
    """The package's annotator, whose prompt and parser serve; the judge stands in for its model."""
    length_control: str | None = None
    """The package's df_gamed.csv, which belongs to its own 805 instructions in their order. None: the win rate is
    controlled for length alone, not for how difficult an instruction is."""
    metric: Literal["win_rate", "length_controlled_winrate"] = "length_controlled_winrate"
    """The report's headline."""


class Options(Config):
    """How the models are asked, and the judge."""

    backend: Literal["hf", "vllm"] = "hf"
    """What runs the model: transformers, or vLLM (`pip install -e '.[vllm]'`) on as many GPUs as `resources.gpus`
    says."""
    apply_chat_template: bool = True
    """Wrap each question in the tokenizer's chat template; without, turns follow each other as plain text."""
    system_instruction: str | None = None
    """A system message before every question."""
    batch_size: int = Field(default=16, ge=1)
    """Answers generated together."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights; `auto` is that of the checkpoint."""
    max_new_tokens: int = Field(default=1024, ge=1)
    """The longest answer."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first so many questions: for a trial, never for a score to report."""
    concurrency: int = Field(default=8, ge=1, le=256)
    """How many requests are with the judge at a time."""
    timeout: float = Field(default=120.0, gt=0)
    """Seconds until a request is given up and sent again."""
    retries: int = Field(default=8, ge=0)
    """How often a request is sent again after 429, a server's error, a cut connection or a time-out, waiting longer
    each time."""
    attempts: int = Field(default=3, ge=1)
    """How often a judgement that cannot be read is asked for, before it is counted as missing."""


class JudgeStage(EvaluationStage):
    """Answers judged through the endpoint that OPENAI_BASE_URL and OPENAI_API_KEY name."""

    kind: ClassVar[str] = "judge"
    version: ClassVar[int] = 1
    fingerprint_exclude: ClassVar[tuple[str, ...]] = ("options.concurrency", "options.timeout", "options.retries")

    judge: str = Field(min_length=1)
    """The judging model, as the endpoint knows it."""
    mt_bench: MTBench | None = None
    alpaca_eval: AlpacaEval | None = None
    options: Options = Options()
    seed: int = Field(default=23, ge=0, lt=2**32)
    """Of the answers that are drawn: MT-Bench asks for writing and roleplay at temperature 0.7."""

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if self.mt_bench is None and self.alpaca_eval is None:
            raise ValueError("needs mt_bench, alpaca_eval or both")
        return self

    @property
    def versioned_packages(self) -> tuple[str, ...]:
        """AlpacaEval's prompts, parsers and metrics are the package's."""
        return ("alpaca_eval",) if self.alpaca_eval else ()

    def needs(self) -> dict[str, Need]:
        """The models, and every file."""
        needs = super().needs()
        for part, section in (("mt_bench", self.mt_bench), ("alpaca_eval", self.alpaca_eval)):
            for field in ("questions", "references", "prompts", "instructions", "length_control"):
                if (reference := getattr(section, field, None)) is not None:
                    needs[f"{part}.{field}"] = Need("data", reference, f"{part}.{field}")
        return needs

    def check(self, files: dict[str, Path]) -> None:
        """Whether every file can be read, what is needed is installed, and the endpoint has the judge."""
        check_model(files["model"], self.trust_remote_code, "models")
        check_context(files["model"], self.options.max_new_tokens, "options.max_new_tokens")
        self.estimates(files)
        for package in ("openai", *(["alpaca_eval"] if self.alpaca_eval else [])):
            if find_spec(package) is None:
                raise UserError(f"needs the package {package}; pip install -e '.[judge]'", "judge")
        require_vllm(self.options.backend)
        _require_once(self.judge)

    def estimates(self, files: dict[str, Path]) -> list[Estimate]:
        """What the judge will be asked, for each benchmark. Raises UserError for a file that cannot be used."""
        parts = [name for name in _ESTIMATES if getattr(self, name) is not None]
        data = tuple((name, path) for name, path in sorted(files.items()) if name.partition(".")[0] in parts)
        return [_estimated(name, data, self.options.limit, self.options.max_new_tokens) for name in parts]

    def paid_requests(self, files: dict[str, Path]) -> list[str]:
        """Calls and tokens of the judge, where the files are here."""
        if all(name in files for name, need in self.needs().items() if need.kind == "data"):
            return [f"{self.judge}: {estimate}" for estimate in self.estimates(files)]
        return [f"{self.judge}: how many calls is known once its files are here; --prefetch fetches them"]

    def foreign_code(self, files: dict[str, Path]) -> list[str]:
        """The model's."""
        return [REMOTE_CODE] if self.trust_remote_code else []


_ESTIMATES = {"mt_bench": estimate_mt_bench, "alpaca_eval": estimate_alpaca_eval}


@cache
def _estimated(benchmark: str, files: tuple[tuple[str, Path], ...], limit: int | None, max_new_tokens: int) -> Estimate:
    """Read the files once for all the models that are judged. Raises UserError."""
    return _ESTIMATES[benchmark](dict(files), limit, max_new_tokens)


@cache
def _require_once(judge: str) -> None:
    """Ask the endpoint once for all the models that are judged. Raises UserError."""
    from stages.judge.endpoint import require_model  # HTTP and TLS take a tenth of what a plan may take

    require_model(judge)
