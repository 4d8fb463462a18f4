"""The `judge` section of a recipe. Imports no torch, openai or alpaca_eval, so that planning stays fast."""

from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.base import Config, Need, UserError
from stages.evaluation.config import EvaluationStage, ModelOptions, require_vllm
from stages.judge.questions import RequestEstimate, request_estimates
from stages.models.model_folder import check_context, check_model


class MTBench(Config):
    """MT-Bench (Zheng et al., NeurIPS 2023): questions of two turns, each answer graded from 1 to 10."""

    questions: str
    """A file of rows {"question_id", "category", "turns": [first, second]}."""
    references: str
    """A file of rows {"question_id", "choices": [{"turns": [...]}]}: reference answers to math, reasoning, coding."""
    prompts: str
    """A file of the judge's prompts, named single-v1, single-math-v1 and both with -multi-turn."""


class AlpacaEval(Config):
    """AlpacaEval (Li et al., 2023; length-controlled: Dubois et al., 2024): how often an answer is preferred."""

    instructions: str
    """A file of rows {"instruction", "output", "generator"}: instructions with the reference outputs of one model."""
    annotator: str = "weighted_alpaca_eval_gpt4_turbo"
    """The annotator of the package alpaca_eval whose prompt and parser are used. `judge` replaces its model."""
    length_control: str | None = None
    """The package's df_gamed.csv, which fits only its own 805 instructions in their order. None: the win rate is
    controlled for length alone, not for the difficulty of an instruction."""
    metric: Literal["win_rate", "length_controlled_winrate"] = "length_controlled_winrate"
    """The report's headline metric."""


class Options(ModelOptions):
    """How the models answer, and how requests go to the judge."""

    backend: Literal["hf", "vllm"] = "hf"
    """Inference library: transformers, or vLLM (`pip install -e '.[vllm]'`) on the stage's `resources.gpus`."""
    apply_chat_template: bool = True
    """Format each question with the tokenizer's chat template. False: turns are concatenated as plain text."""
    system_instruction: str | None = None
    """A system message before every question."""
    max_new_tokens: int = Field(default=1024, ge=1)
    """Maximum length of an answer."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first `limit` questions. For trials, not for scores that you report."""
    concurrency: int = Field(default=8, ge=1, le=256)
    """Requests to the judge at a time."""
    timeout: float = Field(default=120.0, gt=0)
    """Seconds until a request fails and is sent again."""
    retries: int = Field(default=8, ge=0)
    """How often a request is sent again after status 429 or 5xx, a cut connection or a time-out."""
    attempts: int = Field(default=2, ge=1)
    """How often the judge is asked until its judgement is readable. After that, the judgement counts as missing."""


class JudgeStage(EvaluationStage):
    """AlpacaEval and MT-Bench with a judge behind the endpoint that OPENAI_BASE_URL and OPENAI_API_KEY name."""

    kind: ClassVar[str] = "judge"
    version: ClassVar[int] = 3
    is_forked: ClassVar[bool] = True
    fingerprint_exclude: ClassVar[tuple[str, ...]] = ("options.concurrency", "options.timeout", "options.retries")

    judge: str = Field(min_length=1)
    """The judging model's name at the endpoint."""
    mt_bench: MTBench | None = None
    alpaca_eval: AlpacaEval | None = None
    options: Options = Options()
    seed: int = Field(default=23, ge=0, lt=2**32)
    """For sampled answers: MT-Bench samples writing, roleplay, stem and humanities."""

    @model_validator(mode="after")
    def _has_a_benchmark(self) -> Self:
        if self.mt_bench is None and self.alpaca_eval is None:
            raise ValueError("needs mt_bench, alpaca_eval or both")
        return self

    @property
    def versioned_packages(self) -> tuple[str, ...]:
        return ("alpaca_eval",) if self.alpaca_eval else ()

    def needs(self) -> dict[str, Need]:
        references: dict[str, str] = {}
        if self.mt_bench is not None:
            references |= {f"mt_bench.{field}": reference for field, reference in self.mt_bench}
        if self.alpaca_eval is not None:
            references["alpaca_eval.instructions"] = self.alpaca_eval.instructions
            if self.alpaca_eval.length_control is not None:
                references["alpaca_eval.length_control"] = self.alpaca_eval.length_control
        return super().needs() | {key: Need("data", reference, key) for key, reference in references.items()}

    def check(self, files: dict[str, Path]) -> None:
        check_model(files["model"], self.trust_remote_code, "models")
        check_context(files["model"], self.options.max_new_tokens, "options.max_new_tokens")
        self.request_estimates(files)
        for package in ("openai", *self.versioned_packages):
            if find_spec(package) is None:
                raise UserError(f"needs the package {package}; pip install -e '.[judge]'", "judge")
        require_vllm(self.options.backend)

    def check_services(self) -> None:
        from stages.judge.endpoint import require_model  # HTTP and TLS are slow to import

        require_model(self.judge)

    def request_estimates(self, files: dict[str, Path]) -> list[RequestEstimate]:
        """Estimate each benchmark's requests to the judge. Raises UserError for a file that cannot be used."""
        data = tuple((name, path) for name, path in sorted(files.items()) if name != "model")
        return request_estimates(data, self.options.limit, self.options.max_new_tokens)

    def paid_requests(self, files: dict[str, Path]) -> list[str]:
        if all(name in files for name, need in self.needs().items() if need.kind == "data"):
            return [f"{self.judge}: {estimate}" for estimate in self.request_estimates(files)]
        return [f"{self.judge}: the number of calls is known once its files are here; --prefetch fetches them"]
