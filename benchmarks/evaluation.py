"""Compare the lm_eval stage's engine with `python -m lm_eval` on the same items, settings and dtype.

    python -m benchmarks.evaluation [--model FOLDER] [--items 96] [--case NAME] [--dtype DTYPE]

Three kinds of tasks, built of 503 questions and answers of the zaragoza-construction-faq package (real English text) as
the benchmarks in the papers are: `mmlu` has five solved questions before each one and the letters A to D as answers,
`choice` scores four full answers without examples, `reasoning` generates up to 128 tokens after three solved examples.
In float32 on CPUs, in bfloat16 where there is a GPU, or in the dtype that is named. lm-eval runs with batches of 1, 4
and 16; its best counts.

Start-up is the same for both and is left out: a run over one item is subtracted from the run over all. On CPUs, seconds
are processor seconds with one thread, which other programs disturb less than the clock; with a GPU, those of the clock.
Prints them, the speed-up over lm-eval's best, the largest difference of a log-probability and how many answers differ,
beside the same differences between lm-eval's own smallest and largest batches. The default model is SmolLM2-135M from a
Python package index (98 MB, converted once).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.data import CACHE, machine, rows_file, smollm2

BATCHES = (1, 4, 16)
TARGETS = {"mmlu": 5.0, "choice": 2.0, "reasoning": 1.7}
SHOTS = {"mmlu": 5, "choice": 0, "reasoning": 3}
CHOICE = {"output_type": "multiple_choice", "doc_to_target": "target", "metric_list": [{"metric": "acc"}]}
TASKS: dict[str, dict[str, Any]] = {
    "mmlu": CHOICE
    | {
        "description": "The following are multiple choice questions (with answers) about building.\n\n",
        "doc_to_text": "{{question}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\n"
        "D. {{choices[3]}}\nAnswer:",
        "doc_to_choice": ["A", "B", "C", "D"],
    },
    "choice": CHOICE | {"doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_choice": "choices"},
    "reasoning": {
        "output_type": "generate_until",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": " {{answer}}",
        "generation_kwargs": {"until": ["Q:", "\n\n"], "do_sample": False, "max_gen_toks": 128},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(folder: Path, cache: Path, items: int) -> None:
    """Write the items and a task file for each kind."""
    rows = [json.loads(line) for line in rows_file(cache).open(encoding="utf-8")]
    answers = [" ".join(row["output"].split()[:18]) for row in rows]
    docs = []
    for number, row in enumerate(rows):
        choices = [answers[(number + step) % len(rows)] for step in (0, 101, 202, 303)]
        target = number % 4
        choices[0], choices[target] = choices[target], choices[0]
        docs.append({"question": row["instruction"], "choices": choices, "target": target, "answer": row["output"]})
    for name, part in {"dev": docs[:5], "test": docs[5 : 5 + items]}.items():
        lines = [json.dumps(doc) + "\n" for doc in part]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    data = {name: str(folder / f"{name}.jsonl") for name in ("dev", "test")}
    for name, task in TASKS.items():
        settings = {
            "task": f"bench_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": data},
            "test_split": "test",
            "fewshot_split": "dev",
            "fewshot_config": {"sampler": "first_n"},
            "num_fewshot": SHOTS[name],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings | task), encoding="utf-8")


def lm_eval_call(model: Path, folder: Path, name: str, dtype: str, batch: int) -> list[str]:
    """Return the command line of lm-eval; its samples go to a folder of the batch size."""
    call = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", f"bench_{name}", "--log_samples"]
    call += ["--model_args", f"pretrained={model},dtype={dtype}", "--include_path", str(folder)]
    return [*call, "--batch_size", str(batch), "--output_path", str(folder / f"{name}-{batch}")]


def stage_call(model: Path, folder: Path, name: str, dtype: str, limit: int | None) -> list[str]:
    """Return the command line that runs the stage alone, in a process like that of a step."""
    arguments = [str(model), str(folder), name, dtype, str(limit or 0)]
    return [sys.executable, "-m", "benchmarks.evaluation", "--child", *arguments]


def run_stage(model: str, folder: str, name: str, dtype: str, limit: str) -> None:
    """Run the stage; its samples go to the folder `NAME-stage`."""
    from stages.base import Context, Input
    from stages.lm_eval.config import LMEvalStage
    from stages.lm_eval.stage import run

    out = Path(folder) / f"{name}-stage"
    tasks = [{"task": f"bench_{name}"}]
    options = {"dtype": dtype, "limit": int(limit) or None}
    config = LMEvalStage(models=["m"], include_path=folder, tasks=tasks, options=options)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as scratch:
        places = [out, *(Path(scratch) / each for each in ("scratch", "checkpoints", "cache"))]
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
        inputs = {"model": Input(Path(model)), "include_path": Input(Path(folder))}
        context = Context("bench", name, config, inputs, *places, progress=lambda *_: None)
        print(json.dumps(run(context).notes))


def seconds(call: list[str]) -> float:
    """Run a command; return its processor seconds with one thread, or its wall time where there is a GPU."""
    import torch

    on_gpu = torch.cuda.is_available()
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | ({} if on_gpu else {"OMP_NUM_THREADS": "1"})

    def now() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.perf_counter() if on_gpu else children.ru_utime + children.ru_stime

    started = now()
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=os.environ | settings)
    if done.returncode:
        sys.exit(f"{' '.join(call)} failed:\n{done.stderr[-2_000:]}")
    return now() - started


def answers_in(folder: Path) -> dict[int, Any]:
    """Return the model's answers in a folder of samples, by item."""
    (file,) = folder.rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in file.open(encoding="utf-8")]
    return {sample["doc_id"]: sample["filtered_resps"] for sample in samples}


def differences(one: dict[int, Any], other: dict[int, Any]) -> tuple[float | None, int]:
    """Return the largest difference of a log-probability, None for generated text, and how many answers differ."""
    assert one.keys() == other.keys()
    if isinstance(next(iter(one.values()))[0], str):
        return None, sum(one[item] != other[item] for item in one)
    pairs = [(list(map(_choice, one[item])), list(map(_choice, other[item]))) for item in one]
    largest = max(abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))
    return largest, sum(ours.index(max(ours)) != theirs.index(max(theirs)) for ours, theirs in pairs)


def _choice(response: Any) -> float:
    return float(response[0])


def compare(model: Path, folder: Path, name: str, dtype: str) -> None:
    """Print the figures of one kind of task."""
    theirs = {}
    for batch in BATCHES:
        call = lm_eval_call(model, folder, name, dtype, batch)
        theirs[batch] = seconds(call) - seconds([*call[:-1], str(folder / "one"), "--limit", "1"])
    best = min(BATCHES, key=lambda batch: theirs[batch])
    ours = -seconds(stage_call(model, folder, name, dtype, 1))
    ours += seconds(stage_call(model, folder, name, dtype, None))
    samples = {batch: answers_in(folder / f"{name}-{batch}") for batch in BATCHES}
    print(f"{name}, {SHOTS[name]}-shot, {dtype}:")
    for batch, each in theirs.items():
        print(f"  lm-eval, batches of {batch:<3} {each:8.1f} s")
    print(f"  the stage              {ours:8.1f} s: {theirs[best] / ours:.1f} x (aim {TARGETS[name]:g} x)")
    for label, one, other in (
        (f"the stage and lm-eval's batches of {best}", answers_in(folder / f"{name}-stage"), samples[best]),
        (f"lm-eval's batches of {BATCHES[0]} and {BATCHES[-1]}", samples[BATCHES[0]], samples[BATCHES[-1]]),
    ):
        largest, differing = differences(one, other)
        difference = "" if largest is None else f"largest difference of a log-probability {largest:.1e}, "
        print(f"  {label}: {difference}{differing} of {len(one)} answers differ", flush=True)


def main() -> None:
    """Parse the command line and compare."""
    if sys.argv[1:2] == ["--child"]:
        run_stage(*sys.argv[2:])
        return
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder that from_pretrained loads")
    parser.add_argument("--items", type=int, default=96)
    parser.add_argument("--case", choices=list(TASKS), action="append")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for downloads")
    options = parser.parse_args()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{machine()}, {gpu}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder), options.cache, options.items)
        for name in options.case or TASKS:
            model = options.model or smollm2(options.cache)
            usual = "bfloat16" if torch.cuda.is_available() else "float32"
            compare(model, Path(folder), name, options.dtype or usual)


if __name__ == "__main__":
    main()
