"""One optimiser step on two processes is that on one: the denominator is counted over both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.stages.sft.test_loss import ROWS, formula, train_one_step
from tests.tiny import tiny_model

WEIGHTS = (0.4, 0.6)


@pytest.mark.parametrize(("batch", "accumulation"), [(2, 1), (1, 2)])
def test_two_ranks_give_the_formulas_gradients(tmp_path: Path, batch: int, accumulation: int) -> None:
    """Real processes over gloo; the rows have different lengths, so a mean of the ranks' means would differ."""
    assert len({len(row["prompt"] + row["completion"]) for row in ROWS}) == len(ROWS)
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", __name__]
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    arguments = [str(tmp_path), str(batch), str(accumulation)]
    done = subprocess.run([*call, *arguments], cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    model = tiny_model(dtype=torch.float64)
    expected = formula(model, WEIGHTS)
    expected.backward()
    kept = torch.load(tmp_path / "gradients.pt")
    assert kept["loss"] == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        gradient = kept["gradients"][name]
        assert (gradient - parameter.grad).norm() / parameter.grad.norm() < 1e-6, name


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    loss, gradients = train_one_step(folder, WEIGHTS, int(sys.argv[2]), int(sys.argv[3]))
    if os.environ["RANK"] == "0":
        torch.save({"loss": loss, "gradients": gradients}, folder / "gradients.pt")
