"""Process that estimates the cost of steps: `python -m pipeline.preflight.estimate_worker`."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from pipeline.preflight.probe import serve
from pipeline.run.worker import loadable
from stages import KINDS
from stages.estimate.result import EstimateInputs


def _estimate(step: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    config, inputs = KINDS[step["kind"]].model_validate(step["config"]), step["inputs"]
    inputs["paths"] = {name: loadable(Path(path), Path(job["cache"])) for name, path in inputs["paths"].items()}
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        inputs |= {"device": "cuda", "room": gpu.total_memory, "room_of": f"each {gpu.name}"}
    with tempfile.TemporaryDirectory() as scratch:
        return dict(config.load("estimate")(config, EstimateInputs(**inputs, scratch=scratch)).model_dump())


if __name__ == "__main__":
    serve(_estimate)
