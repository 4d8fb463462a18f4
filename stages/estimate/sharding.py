"""Into how many parts `launch` splits weights, gradients and optimiser state."""

from __future__ import annotations

from dataclasses import dataclass

from stages.training.launch import Launch

AWAY = float("inf")
"""Of what is offloaded."""


@dataclass(frozen=True)
class Shards:
    """How many devices share each; 1 where each has all of it, infinity where none has any."""

    weights: float = 1
    gradients: float = 1
    optimiser: float = 1


def shards(launch: Launch | None) -> Shards:
    """By FSDP's strategy or ZeRO's stage; what is offloaded lies in main memory."""
    if launch is None or launch.sharding is None:
        return Shards()
    options, n = launch.model_dump(), float(launch.num_processes)
    if launch.sharding == "use_fsdp":
        strategy = str(options.get("fsdp_sharding_strategy", "FULL_SHARD")).upper()
        if strategy in ("NO_SHARD", "3"):
            return Shards()
        reshards = str(options.get("fsdp_reshard_after_forward", "true")).lower() not in ("false", "shard_grad_op")
        whole = strategy in ("SHARD_GRAD_OP", "2", "_HYBRID_SHARD_ZERO2", "5") or not reshards
        if str(options.get("fsdp_offload_params", "false")).lower() == "true":
            return Shards(AWAY, AWAY, AWAY)
        return Shards(1 if whole else n, n, n)
    stage = int(options.get("zero_stage", 2))
    parameters_away = options.get("offload_param_device", "none") in ("cpu", "nvme")
    optimiser_away = options.get("offload_optimizer_device", "none") in ("cpu", "nvme")
    return Shards(
        weights=AWAY if parameters_away else n if stage == 3 else 1,
        gradients=n if stage >= 2 else 1,
        optimiser=AWAY if optimiser_away else n if stage >= 1 else 1,
    )
