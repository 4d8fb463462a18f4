"""benchmarks/gpu.py and the environment of tests/gpu, as far as a CPU can run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[1]


def test_every_way_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model on a CPU. Packages that are not installed, as flash-attn here, get a row that says so."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 2048, "head_dim": 2}
    monkeypatch.setattr(gpu, "SHAPE", gpu.SHAPE | shape)
    monkeypatch.setattr(gpu, "PACK", 128)
    monkeypatch.setattr(gpu, "WARM_UP", 1)
    monkeypatch.setattr(gpu, "MAX_STEPS", 2)
    short = [{name: values[:20] for name, values in row.items()} for row in gpu.rows(120)]
    monkeypatch.setattr(gpu, "rows", lambda: short)
    compiled = [way for way in gpu.WAYS if "torch_compile" in way.fields and not way.package]
    assert len(compiled) == 2
    rest = [way for way in gpu.WAYS if way not in compiled and way.attention != "flex_attention"]
    monkeypatch.setattr(gpu, "WAYS", rest)
    table = list(gpu.lines("cpu", 300))
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in table if "|" in line
    }
    for way in rest:
        first, *others = rows[way.name]
        if way.package:
            assert first == f"not measured: {way.package.replace('_', '-')} is not installed"
        else:
            assert int(first.replace(",", "")) > 0, first
            assert others[0] == "0.000"  # the peak of a CPU is not known
    assert float(rows["full float32 logits"][0]) > 0
    assert float(rows["TRL fused, which WITTrainer uses"][2]) > 0
    assert any("MISSED" in line for line in table)


def test_no_way_starts_without_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "rows", list)
    table = "\n".join(gpu.lines("cpu", 0))
    assert table.count("not measured") == len(gpu.WAYS) + 4


def test_the_page_has_a_place_for_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(gpu.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(gpu, "PAGE", page)
    gpu.write_page("| a table |")
    gpu.write_page("| another |")
    assert f"{gpu.START}\n\n| another |\n\n{gpu.END}" in page.read_text(encoding="utf-8")
    assert "| a table |" not in page.read_text(encoding="utf-8")


def test_gpu_tests_run_from_a_clone_that_is_not_installed(tmp_path: Path) -> None:
    """The interpreter below the virtual environment finds libraries by PYTHONPATH only, as do the commands that tests
    start."""
    python = os.path.realpath(sys.executable)
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(libraries), "PYTHONSAFEPATH": ""}
    program = (
        "import sys; from pathlib import Path; from tests.pipeline.run.test_command import command;"
        "done = command(Path(sys.argv[1]), '--plan'); print(done.stdout + done.stderr)"
    )
    call = [python, "-c", program, str(tmp_path)]
    model = ROOT / "recipes/pocket/model"
    recipe = (
        "name: r\nmodel: {}\nstages:\n  s: {{kind: lm_eval, models: [base], tasks: [{{task: mmlu, num_fewshot: 0}}]}}\n"
    )
    (tmp_path / "r.yaml").write_text(recipe.format(model))
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError" not in done.stdout + done.stderr
    assert "s[base]" in done.stdout, done.stdout + done.stderr
    collect = [python, "-m", "pytest", "-m", "gpu", "tests/gpu", "--collect-only", "-q"]
    done = subprocess.run(collect, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_cuda.py" in done.stdout
