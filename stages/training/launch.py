"""A training step in several processes: what a recipe may say under `launch`, and how `accelerate launch` is called.

Reading a recipe imports neither torch nor accelerate; only `run_ranks`, called by a worker, does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from stages.base import UserError
from stages.library_options.option_models import Options, options

if TYPE_CHECKING:
    LaunchOptions = Options
else:
    LaunchOptions = options("launch")

ON_GPUS_ONLY = ("use_fsdp", "use_deepspeed")
"""What accelerate does not do on CPUs: it would train unsharded copies without a word."""

_ENDED = "ended with status {} before it had a result (out of memory?)"


class Launch(LaunchOptions):
    """Options of `accelerate launch`, by their names there."""

    num_processes: int = Field(ge=1)
    """How many processes train together, on all machines; each has its own `per_device_train_batch_size` rows."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        set_ = self.model_dump()
        if set_.get("use_fsdp") and set_.get("use_deepspeed"):
            raise ValueError("use_fsdp and use_deepspeed exclude each other; leave one out")
        if (machines := set_.get("num_machines", 1)) < 1 or self.num_processes % machines:
            raise ValueError(
                f"num_processes {self.num_processes} is for all machines together, so it is a multiple of"
                f" num_machines {machines}"
            )
        for given, needed in (("fsdp_", "use_fsdp"), ("zero", "use_deepspeed"), ("offload_", "use_deepspeed")):
            if (found := [name for name in set_ if name.startswith(given)]) and not set_.get(needed):
                raise ValueError(f"{found[0]} has no effect without {needed}; set {needed}: true")
        return self

    @property
    def here(self) -> int:
        """How many processes run on this machine."""
        return self.num_processes // int(self.model_dump().get("num_machines", 1))

    @property
    def sharding(self) -> str | None:
        """The option that splits the model between processes, if one is set."""
        return next((name for name in ON_GPUS_ONLY if self.model_dump().get(name)), None)


class RankFailed(Exception):
    """A process of the step ended with another status than 0."""


def run_ranks(launch: Launch, module: str, arguments: list[str], folder: Path) -> None:
    """Run `python -m module arguments` in every process of `launch`, and return when all have ended.

    Args:
        launch: the section of the recipe.
        module: what each process runs; it finds its number in the variable RANK.
        arguments: of the module.
        folder: where accelerate's configuration is written.

    Raises:
        UserError: this machine cannot do what `launch` says.
        RankFailed: a process ended with another status than 0; the others were ended.
    """
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if not torch.cuda.is_available():
        if launch.sharding:
            raise UserError(
                f"launch.{launch.sharding}: accelerate shards a model on GPUs only, and"
                " there is none here; remove it to train with a whole copy in each process"
            )
        os.environ["ACCELERATE_USE_CPU"] = "true"  # `--cpu` itself starts one process only; torch's launcher starts all
    os.environ["PYTHONSAFEPATH"] = "1"  # as `python -P`: a user's own folder `stages` must not stand in for ours
    set_ = launch.model_dump()
    if set_.get("num_machines", 1) == 1 and "main_process_port" not in set_:
        os.environ["PET_STANDALONE"] = "1"  # torch's launcher binds a free port, so steps side by side never collide
    parser = launch_command_parser()
    line = [*_flags(parser, launch, _no_defaults(folder)), "--module", module, *arguments]
    try:
        launch_command(parser.parse_args(line))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise RankFailed(f"process {rank} {_ENDED.format(failure.exitcode)}") from None
    except subprocess.CalledProcessError as error:
        raise RankFailed(f"its process {_ENDED.format(error.returncode)}") from None


def _no_defaults(folder: Path) -> Path:
    """A configuration that stands in for the one `accelerate config` left on this machine, which no recipe names."""
    file = folder / "accelerate.json"
    empty = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "num_processes": 1, "num_machines": 1}
    file.write_text(json.dumps(empty | {"debug": False, "use_cpu": False}))
    return file


def _flags(parser: argparse.ArgumentParser, launch: Launch, configuration: Path) -> list[str]:
    """The command line of `accelerate launch` that says what `launch` says."""
    given: dict[str, Any] = {"config_file": str(configuration), "num_machines": 1, "main_process_port": 0}
    if launch.sharding is None and launch.num_processes > 1:
        given["multi_gpu"] = True  # the launcher for several processes, on CPUs as well
    if launch.model_dump().get("zero_stage") == 3:
        given["zero3_save_16bit_model"] = True  # or the finished weights could not be gathered
    given |= launch.model_dump()
    line: list[str] = []
    for action in parser._actions:
        flag = next((name for name in action.option_strings if name.startswith("--")), None)
        if flag is None or (value := given.get(flag[2:].replace("-", "_"))) is None:
            continue
        if action.nargs == 0:
            line += [flag] if value else []
        else:
            line.append(f"{flag}={str(value).lower() if isinstance(value, bool) else value}")
    return line
