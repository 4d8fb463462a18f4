"""Training in several processes: a recipe's `launch` section, and the call of `accelerate launch`.

Only `run_ranks`, which a worker calls, imports torch and accelerate; reading a recipe does not.
"""

import json
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from stages.base import UserError
from stages.library_options.option_models import LaunchOptions, option_kinds

SHARDING_OPTIONS = ("use_fsdp", "use_deepspeed")
"""They need GPUs: on CPUs, accelerate would silently train an unsharded copy in each process."""

_EXIT_MESSAGE = "ended with status {} before it had a result (out of memory?)"


class Launch(LaunchOptions):
    """Options of `accelerate launch`, by their names there."""

    num_processes: int = Field(ge=1)
    """Number of processes on all machines together. Each has its own `per_device_train_batch_size` rows."""

    @model_validator(mode="after")
    def _machines_fit(self) -> Self:
        options = self.model_dump()
        if (machines := options.get("num_machines", 1)) < 1 or self.num_processes % machines:
            raise ValueError(
                f"num_processes counts all machines together; {self.num_processes} is not a multiple of"
                f" num_machines {machines}"
            )
        return self

    @property
    def processes_per_machine(self) -> int:
        """Number of processes on each machine."""
        return self.num_processes // int(self.model_dump().get("num_machines", 1))

    @property
    def sharding(self) -> str | None:
        """The option that splits the model between processes; None if no such option is set."""
        return next((name for name in SHARDING_OPTIONS if self.model_dump().get(name)), None)


def require_sharding(launch: Launch) -> None:
    """Raise UserError if this machine cannot shard a model as `launch` asks for."""
    import torch

    if launch.sharding and not torch.cuda.is_available():
        text = "accelerate shards a model on GPUs only, and this machine has none; remove it to train a complete copy"
        raise UserError(f"{text} in each process", f"launch.{launch.sharding}")
    if launch.sharding == "use_deepspeed" and find_spec("deepspeed") is None:
        raise UserError(
            "needs the package deepspeed, which is not installed; pip install deepspeed", "launch.use_deepspeed"
        )


class RankFailed(Exception):
    """A process of the step ended with a status other than 0."""


def run_ranks(launch: Launch, module: str, arguments: list[str], folder: Path) -> None:
    """Run `python -m module arguments` in every process of `launch`, and wait until all have ended.

    Each process finds its rank in the environment variable RANK; accelerate's configuration is written to `folder`.

    Raises:
        UserError: This machine cannot run `launch`.
        RankFailed: A process failed; the others were ended.
    """
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    require_sharding(launch)
    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # the option --cpu would start a single process
    os.environ["PYTHONSAFEPATH"] = "1"  # as `python -P`: a folder `stages` of the user must not shadow ours
    options = launch.model_dump()
    if options.get("num_machines", 1) == 1 and "main_process_port" not in options:
        os.environ["PET_STANDALONE"] = "1"  # torch's launcher picks a free port, so concurrent steps never collide
    configuration = folder / "accelerate.json"  # instead of the one that `accelerate config` left on this machine
    empty = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "num_processes": 1, "num_machines": 1}
    configuration.write_text(json.dumps(empty | {"debug": False, "use_cpu": False}))
    command = [*_flags(launch, configuration), "--module", module, *arguments]
    try:
        launch_command(launch_command_parser().parse_args(command))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise RankFailed(f"process {rank} {_EXIT_MESSAGE.format(failure.exitcode)}") from None
    except subprocess.CalledProcessError as error:
        raise RankFailed(f"its process {_EXIT_MESSAGE.format(error.returncode)}") from None


def _flags(launch: Launch, configuration: Path) -> list[str]:
    options: dict[str, Any] = {"config_file": str(configuration), "num_machines": 1, "main_process_port": 0}
    if launch.sharding is None and launch.num_processes > 1:
        options["multi_gpu"] = True  # selects the launcher for several processes, on CPUs as well
    if launch.model_dump().get("zero_stage") == 3:
        options["zero3_save_16bit_model"] = True  # without it, the trained weights could not be gathered
    options |= launch.model_dump()
    flags: list[str] = []
    for name, value in options.items():
        if option_kinds("launch")[name] == ["flag"]:
            flags += [f"--{name}"] if value else []
        elif value is not None:
            flags.append(f"--{name}={str(value).lower() if isinstance(value, bool) else value}")
    return flags
