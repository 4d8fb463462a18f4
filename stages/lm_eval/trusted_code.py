"""Keep third-party code from running in an evaluation unless the recipe allows it. Only this module patches libraries.

evaluate loads a metric by running a Python script from the hub and has no setting that forbids it: without the patch, a
task file can run an untrusted script. lm-eval renders the templates of tasks without jinja2's sandbox, so that they
reach any Python. tests/stages/lm_eval/test_lm_eval_internals.py fails if a patch has no effect.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import lm_eval.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stages.base import UserError
from stages.lm_eval.config import LMEvalStage
from stages.system.library_versions import require_version

require_version("evaluate", "0.4")
require_version("lm_eval", "0.4")

_ALLOW_CODE = "HF_ALLOW_CODE_EVAL"
"""Environment variable that evaluate's code_eval checks before it runs code that a model wrote."""


@contextmanager
def only_trusted_code(config: LMEvalStage) -> Iterator[None]:
    """Run only code that the stage trusts in the block. Raises UserError for a metric from the hub."""
    unsafe = config.options.confirm_run_unsafe_code
    before = os.environ.get(_ALLOW_CODE)
    os.environ[_ALLOW_CODE] = "1" if unsafe else "0"
    try:
        with _sandboxed_templates(), nullcontext() if unsafe or config.trust_remote_code else _no_hub_metrics():
            yield
    finally:
        os.environ.pop(_ALLOW_CODE, None)
        if before is not None:
            os.environ[_ALLOW_CODE] = before


@contextmanager
def _sandboxed_templates() -> Iterator[None]:
    """Render the templates of tasks in jinja2's sandbox, which refuses private attributes and changes of data."""
    before = lm_eval.utils.env
    sandbox = ImmutableSandboxedEnvironment(undefined=before.undefined, keep_trailing_newline=True)
    sandbox.filters |= before.filters
    lm_eval.utils.env = sandbox
    try:
        yield
    finally:
        lm_eval.utils.env = before


@contextmanager
def _no_hub_metrics() -> Iterator[None]:
    """Replace `evaluate.load`. lm-eval catches its errors and fails later, so the block's end raises the refusal."""
    refusals: list[UserError] = []

    def refuse(path: str, *_: Any, **__: Any) -> None:
        message = f"{path!r} is a metric that evaluate loads from the hub, as Python code"
        refusals.append(UserError(f"{message}; if you trust it, set trust_remote_code: true on the stage", "tasks"))
        raise refusals[-1]

    evaluate = sys.modules.get("evaluate") or _lazy_module("evaluate")
    evaluate.load = refuse  # type: ignore[attr-defined]
    try:
        yield
    except Exception:
        if not refusals:
            raise
    finally:
        if type(evaluate) is ModuleType:
            evaluate.load = evaluate.loading.load  # type: ignore[attr-defined]
        else:
            del sys.modules["evaluate"]
    if refusals:
        raise refusals[0] from None


def _lazy_module(name: str) -> ModuleType:
    """Add a module to sys.modules whose code runs when it is first used. What is set before that stays.

    Importing evaluate takes as long as scoring a small model does, and few tasks use it.
    """
    spec = importlib.util.find_spec(name)
    assert spec
    assert spec.loader
    spec.loader = importlib.util.LazyLoader(spec.loader)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
