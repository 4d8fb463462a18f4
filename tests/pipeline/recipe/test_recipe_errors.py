"""Invalid recipes through the command: location, key and remedy on standard error, exit code 2, no files written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli import main
from stages.data.files import read_rows
from tests.tiny import tiny_model

GOOD = """\
name: small
model: ./model
stages:
  wit:
    kind: sft
    data: {train: ./rows.jsonl}
    weights: {prompt: 0.2, completion: 0.8}
    train: {num_train_epochs: 1}
  dpo:
    kind: dpo
    model: wit
    data: {train: ./pairs.jsonl}
  bench:
    kind: lm_eval
    models: [base, wit, dpo]
    tasks: [{task: arc_easy}]
  report: {kind: report}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the good recipe's files, as the current folder."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").touch()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a ", "completion": "b"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a ", "chosen": "b", "rejected": "c"}\n')
    (tmp_path / "r.yaml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def complain(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command, which must exit with 2 and write only to the cache, and return its error message."""
    assert main(["r.yaml", *arguments]) == 2
    assert {path.name for path in Path("runs").glob("*")} <= {"cache"}
    output = capsys.readouterr()
    assert re.fullmatch(r"(checking \d steps: .*\n)?", output.out)
    assert "Traceback" not in output.err
    return output.err


def test_the_good_recipe_plans(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["r.yaml", "--plan"]) == 0
    assert "bench[wit]" in capsys.readouterr().out


CASES = {
    "unknown key": (
        "{prompt: 0.2,",
        "{promt: 0.2,",
        r"r\.yaml:7:15: stages\.wit\.weights\.promt: .*did you mean 'prompt'",
    ),
    "unknown TRL option": (
        "num_train_epochs: 1",
        "num_train_epoch: 1",
        r"r\.yaml:8:13: .*did you mean 'num_train_epochs'",
    ),
    "reserved option": (
        "num_train_epochs: 1",
        "loss_type: dft",
        r"r\.yaml:8:13: .*train\.loss_type: cannot",
    ),
    "wrong type": (
        "num_train_epochs: 1",
        "num_train_epochs: many",
        r"r\.yaml:8:31: .*num_train_epochs: .*found 'many'",
    ),
    "string for a number": (
        "{prompt: 0.2,",
        "{prompt: '0.2',",
        r"r\.yaml:7:23: stages\.wit\.weights\.prompt: .*number",
    ),
    "unknown kind": (
        "kind: sft",
        "kind: sfft",
        r"r\.yaml:5:11: stages\.wit\.kind: 'sfft' is unknown; did you mean 'sft'",
    ),
    "no kind": ("    kind: sft\n", "", r"r\.yaml:4:3: stages\.wit: needs 'kind', one of sft"),
    "unknown stage": (
        "model: wit",
        "model: wot",
        r"r\.yaml:11:12: stages\.dpo\.model: 'wot' is no stage.*did you mean 'wit'",
    ),
    "unknown model of a benchmark": (
        "wit, dpo]",
        "wit, dpi]",
        r"r\.yaml:15:25: stages\.bench\.models\.2: 'dpi'.*'dpo'",
    ),
    "a stage that makes no model": ("model: wit", "model: bench", r"needs its own result: (dpo|bench)|makes no model"),
    "cycle": ("    kind: sft\n", "    kind: sft\n    model: dpo\n", r"needs its own result: wit -> dpo -> wit"),
    "missing data": (
        "./rows.jsonl",
        "./row.jsonl",
        r"r\.yaml:6:19: stages\.wit\.data\.train: .*row\.js.*rows\.js",
    ),
    "missing model": ("./model", "./modle", r"r\.yaml:2:8: model: .*modle.*"),
    "folder that is no model": ("./model", "./", r"r\.yaml:2:8: model: .*config\.json"),
    "no model at all": ("model: ./model\n", "", r"names no model; add 'model:'"),
    "unknown column": (
        "{train: ./rows.jsonl}",
        "{train: ./rows.jsonl, columns: {promt: question}}",
        r"r\.yaml:6:50: stages\.wit\.data\.columns\.promt: 'promt' is not a column of .* which has .*, completion,",
    ),
    "column of preference rows alone": (
        "{train: ./pairs.jsonl}",
        "{train: ./pairs.jsonl, columns: {completion: answer}}",
        r"r\.yaml:12:56: stages\.dpo\.data\.columns\.completion: .* is not a .* chosen, documents, prompt, rej",
    ),
    "column missing in the rows": (
        "{train: ./rows.jsonl}",
        "{train: ./rows.jsonl, columns: {prompt: question}}",
        r"rows\.jsonl:1: column 'question' is missing; the row has prompt, completion",
    ),
    "split of a file": (
        "{train: ./rows.jsonl}",
        "{train: ./rows.jsonl, train_split: held}",
        r"r\.yaml:6:46: stages\.wit\.data\.train_split: .*rows\.jsonl is one file, which has no train_split; remove it",
    ),
    "both weights 0": ("{prompt: 0.2, completion: 0.8}", "{prompt: 0, completion: 0}", r"r\.yaml:7:14: .*both 0"),
    "negative weight": (
        "{prompt: 0.2,",
        "{prompt: -0.2,",
        r"r\.yaml:7:23: stages\.wit\.weights\.prompt: .*greater than or",
    ),
    "weight is no number": ("{prompt: 0.2,", "{prompt: .nan,", r"r\.yaml:7:23: stages\.wit\.weights\.prompt: .*finite"),
    "weight missing": (
        "{prompt: 0.2, completion: 0.8}",
        "{prompt: 0.2}",
        r"stages\.wit\.weights\.completion: is missing",
    ),
    "unknown key below a name that users choose": (
        "{kind: report}",
        "{kind: report, metrics: {chrf: {scal: 100}}}",
        r"r\.yaml:17:43: stages\.report\.metrics\.chrf\.scal: unknown key; did you mean 'scale'\?; the keys are scale",
    ),
    "unknown key at the top": ("name: small", "name: small\nsede: 1", r"r\.yaml:2:1: sede: .*did you mean 'seed'"),
    "bad name": ("name: small", "name: ../small", r"r\.yaml:1:7: name: '\.\./small' is no folder name"),
    "bad stage name": ("  wit:", "  w/t:", r"r\.yaml:4:3: stages\.w/t: is no stage name"),
    "not YAML": ("stages:\n", "stages: [\n", r"r\.yaml:\d+:\d+: not valid YAML"),
    "reads the environment": ("./model", "${oc.env:HOME}", r"r\.yaml:2:8: model: .*oc\.env"),
    "unknown interpolation": ("./model", "${modl}", r"r\.yaml:2:8: model: .*modl"),
    "no stages": (GOOD[GOOD.index("stages:") :], "stages: {}\n", r"r\.yaml:3:9: stages: names no stage"),
    "a list": (GOOD, "- a\n- b\n", r"r\.yaml:1:1: a recipe is a mapping"),
    "kind that is a list": ("kind: sft", "kind: [sft]", r"r\.yaml:5:11: stages\.wit\.kind: \['sft'\] is unknown"),
    "no section": ("  report: {kind: report}", "  report:", r"r\.yaml:17:10: stages\.report: a stage is a mapping"),
    "no stages section": (GOOD[GOOD.index("stages:") :], "stages:\n", r"r\.yaml:3:8: stages: .*dictionary"),
    "taken name": ("name: small", "name: store", r"r\.yaml:1:7: name: 'store' is no folder name"),
    "taken stage name": ("  wit:", "  logs:", r"r\.yaml:4:3: stages\.logs: is no stage name"),
    "negative seed": ("name: small", "name: small\nseed: -1", r"r\.yaml:2:7: seed: .*greater than or equal to 0"),
    "placeholder": ("model: ./model", "model: ???", r"r\.yaml:2:8: model: is '\?\?\?'"),
    "same model twice": ("wit, dpo]", "wit, wit]", r"r\.yaml:15:13: stages\.bench\.models: named more than once: wit"),
    "remote code": (
        "num_train_epochs: 1",
        "model_init_kwargs: {trust_remote_code: true}",
        r"r\.yaml:8:33: stages\.wit\.train\.model_init_kwargs\.trust_remote_code: .*did you mean 'stages.wit.trust",
    ),
    "secret": ("num_train_epochs: 1", "hub_token: x", r"stages\.wit\.train\.hub_token: cannot be set here: .*secrets"),
    "evaluation without data": ("num_train_epochs: 1", "eval_strategy: epoch", r"name it as data\.eval"),
    "unknown choice": (
        "num_train_epochs: 1",
        "lr_scheduler_type: cosin",
        r"r\.yaml:8:32: stages\.wit\.train\.lr_scheduler_type: found 'cosin'; did you mean 'cosine'\?; allowed are ",
    ),
    "a key by its initials": (
        "num_train_epochs: 1",
        "lr: 1.0e-4",
        r"r\.yaml:8:\d+: stages\.wit\.train\.lr: unknown key; did you mean 'learning_rate'\?",
    ),
    "a dtype in another notation": (
        "num_train_epochs: 1",
        "model_init_kwargs: {dtype: bf16}",
        r"r\.yaml:8:\d+: stages\.wit\.train\.model_init_kwargs\.dtype: found 'bf16'; .*float32, bfloat16",
    ),
    "unknown attention": (
        "num_train_epochs: 1",
        "model_init_kwargs: {attn_implementation: flash}",
        r"r\.yaml:8:\d+: stages\.wit\.train\.model_init_kwargs\.attn_.*: found 'flash'; did you mean 'flash_",
    ),
    "unknown choice of many, similar to none": (
        "num_train_epochs: 1",
        "optim: foo",
        r"r\.yaml:8:20: stages\.wit\.train\.optim: found 'foo'; docs/reference\.md lists all 41\n",
    ),
    "unknown choice of many": (
        "num_train_epochs: 1",
        "optim: adamw_tortch",
        r"r\.yaml:8:20: stages\.wit\.train\.optim: found 'adamw_tortch'; did you mean 'adamw_torch'\?\n",
    ),
    "unknown choice of LoRA": (
        "num_train_epochs: 1}",
        "num_train_epochs: 1}\n    lora: {bias: al}",
        r"r\.yaml:9:18: stages\.wit\.lora\.bias: found 'al'; did you mean 'all'\?; allowed are none, all, lora_only",
    ),
    "neither true nor a choice": (
        "num_train_epochs: 1}",
        "num_train_epochs: 1}\n    lora: {init_lora_weights: pisa}",
        r"r\.yaml:9:31: .*valid boolean, or else one of the allowed words, found 'pisa'; did you mean 'pissa'",
    ),
    "unknown choice in a list": (
        "{train: ./pairs.jsonl}",
        "{train: ./pairs.jsonl}\n    train: {loss_type: [sigmoid, ipoo]}",
        r"r\.yaml:13:34: stages\.dpo\.train\.loss_type\.1: found 'ipoo'; did you mean 'ipo'\?; allowed are sig",
    ),
    "losses and weights": (
        "{train: ./pairs.jsonl}",
        "{train: ./pairs.jsonl}\n    train: {loss_weights: [1, 2]}",
        r"r\.yaml:13:27: stages\.dpo\.train\.loss_weights: has 2 weights for 1 losses",
    ),
    "no rows at a time": (
        "num_train_epochs: 1",
        "per_device_train_batch_size: 0",
        r"r\.yaml:8:42: .*per_device_train_batch_size: should be greater than or equal to 1, found 0",
    ),
    "two precisions": (
        "num_train_epochs: 1",
        "fp16: true, bf16: true",
        r"r\.yaml:8:31: stages\.wit\.train\.bf16: cannot be set together with fp16",
    ),
    "unknown setting of generation": (
        "tasks: [{task: arc_easy}]",
        "tasks: [{task: arc_easy}]\n    options: {gen_kwargs: {max_gen_tok: 9}}",
        r"r\.yaml:17:28: stages\.bench\.options\.gen_kwargs\.max_gen_tok: unknown key; did you mean 'max_gen_toks'",
    ),
    "setting of generation that lm-eval sets": (
        "tasks: [{task: arc_easy}]",
        "tasks: [{task: arc_easy}]\n    options: {gen_kwargs: {pad_token_id: 9}}",
        r"r\.yaml:17:28: stages\.bench\.options\.gen_kwargs\.pad_token_id: cannot be set here: lm-eval sets it",
    ),
    "generation by code from elsewhere": (
        "tasks: [{task: arc_easy}]",
        "tasks: [{task: arc_easy}]\n    options: {gen_kwargs: {custom_generate: org/x}}",
        r"r\.yaml:17:28: stages\.bench\.options\.gen_kwargs\.custom_generate: .*would run third-party code",
    ),
    "a report on what scores no model": (
        "report: {kind: report}",
        "report: {kind: report, benchmarks: [bench, wit]}",
        r"r\.yaml:17:46: stages\.report\.benchmarks\.1: 'wit' is of kind sft and scores no model",
    ),
    "memory without a unit": (
        "tasks: [{task: arc_easy}]",
        "tasks: [{task: arc_easy}]\n    resources: {memory: '64'}",
        r"r\.yaml:17:25: stages\.bench\.resources\.memory: should match pattern .*GiB.*, found '64'",
    ),
    "extends itself": ("name: small", "name: small\nextends: r.yaml", r"r\.yaml: extends itself"),
    "extends nothing": (
        "name: small",
        "name: small\nextends: s.yaml",
        r"r\.yaml:2:10: extends: s\.yaml: no such file or folder; .* has r\.yaml",
    ),
    "a name of other tools": ("num_train_epochs: 1", "epochs: 1", r"r\.yaml:8:13: .*did you mean 'num_train_epochs'"),
    "a name of the paper at another place": (
        "    weights: {prompt: 0.2, completion: 0.8}",
        "    lambda_p: 0.2",
        r"r\.yaml:7:5: stages\.wit\.lambda_p: unknown key; did you mean 'stages\.wit\.weights\.prompt'",
    ),
    "a key of a stage at the top": (
        "name: small",
        "name: small\nlora_r: 8",
        r"r\.yaml:2:1: lora_r: unknown key; did you mean 'stages\.wit\.lora\.r'",
    ),
    "a name that is valid only elsewhere": (
        "num_train_epochs: 1",
        "tasks: [mmlu]",
        r"r\.yaml:8:13: stages\.wit\.train\.tasks: unknown key; docs/reference\.md",
    ),
    "a name without a key": ("num_train_epochs: 1", "val_set_size: 9", r"unknown key; write the rows .* data\.eval"),
    "an option of another section": (
        "    train: {num_train_epochs: 1}",
        "    learning_rate: 1.0",
        r"r\.yaml:8:5: .*unknown key here; did you mean 'stages\.wit\.train\.learning_rate'",
    ),
    "another case": ("kind: dpo", "kind: DPO", r"r\.yaml:10:11: .*'DPO' is unknown; did you mean 'dpo'"),
    "a kind that does not exist": ("kind: dpo", "kind: ppo", r"'ppo' is unknown; the kinds are sft, dpo,"),
    "a word of other tools": ("num_train_epochs: 1", "optim: adamw", r"found 'adamw'; did you mean 'adamw_torch'"),
    "a task as text": ("[{task: arc_easy}]", "mmlu", r"stages\.bench\.tasks: should be a valid list, found 'mmlu'"),
    "a number as text": ("num_train_epochs: 1", "max_steps: '10'", r"should be a valid integer, found '10'"),
    "several files": ("./rows.jsonl}", "[a.jsonl, b.jsonl]}", r"r\.yaml:6:19: .*to read several files, move them to a"),
    "an environment variable": ("./rows.jsonl", "$HOME/rows.jsonl", r"'\$HOME/rows\.jsonl': .* no environment .*--set"),
    "an interpolated one": ("./rows.jsonl", "'${DATA}'", r"there is no DATA; recipes read no environment .*--set"),
    "a missing file without ./": (
        "./rows.jsonl",
        "ROWS.json",
        r"ROWS\.json: no such file or folder; .* has rows\.jsonl",
    ),
    "a missing file in a folder": ("./model", "model/config.jso", r"config\.jso: no such .*model has config\.json"),
    "an option that DPO cannot use": (
        "{train: ./pairs.jsonl}",
        "{train: ./pairs.jsonl}\n    train: {train_sampling_strategy: group_by_length}",
        r"r\.yaml:13:38: stages\.dpo\.train\.train_sampling_strategy: cannot be group_by_length",
    ),
    "an option without effect": (
        "{train: ./pairs.jsonl}",
        "{train: ./pairs.jsonl}\n    train: {label_smoothing: 0.1}",
        r"r\.yaml:13:30: .*label_smoothing: has no effect unless loss_type is robust",
    ),
    "a scheduler without what it needs": (
        "num_train_epochs: 1",
        "lr_scheduler_type: warmup_stable_decay",
        r"r\.yaml:8:32: .*warmup_stable_decay needs lr_scheduler_kwargs with num_decay_steps",
    ),
    "empty file": (GOOD, "", r"r\.yaml:1:1: a recipe is a mapping"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_recipe(folder: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    before, after, expected = CASES[case]
    assert before in GOOD
    Path("r.yaml").write_text(GOOD.replace(before, after, 1))
    output = complain(capsys)
    assert re.search(expected, output), output


def test_all_errors_are_reported_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = (
        GOOD.replace("prompt: 0.2", "promt: 0.2")
        .replace("num_train_epochs", "num_epochs")
        .replace("model: wit", "modl: x")
    )
    Path("r.yaml").write_text(bad)
    output = complain(capsys)
    assert {7, 8, 11} <= {int(line) for line in re.findall(r"r\.yaml:(\d+):", output)}


def test_errors_of_every_phase_are_reported_at_once_by_location(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong values, a missing file and unknown stages, some in one stage; each is reported once."""
    bad = GOOD.replace("prompt: 0.2", "promt: 0.2").replace("./rows.jsonl", "./row.jsonl")
    bad = bad.replace("model: wit", "model: wot").replace("wit, dpo]", "wit, dpi]").replace("name: small", "nam: small")
    Path("r.yaml").write_text(bad)
    output = complain(capsys, "--set", "seed=x", "--set", "stages.bench.tasks.3.task=x").splitlines()
    assert [line.removeprefix("run-recipe: ").split(": ")[:2] for line in output] == [
        ["r.yaml:1:1", "name"],
        ["r.yaml:1:1", "nam"],
        ["r.yaml:6:19", "stages.wit.data.train"],
        ["r.yaml:7:14", "stages.wit.weights.prompt"],
        ["r.yaml:7:15", "stages.wit.weights.promt"],
        ["r.yaml:11:12", "stages.dpo.model"],
        ["r.yaml:15:25", "stages.bench.models.2"],
        ["--set seed=x", "seed"],
        ["--set stages.bench.tasks.3.task=x", "stages.bench.tasks.3.task"],
    ]


def test_references_to_a_broken_stage_or_model_are_no_errors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.yaml").write_text(GOOD.replace("kind: sft", "kind: sfft").replace("./model", "[1]"))
    output = complain(capsys).splitlines()
    assert [line.split(": ")[1:3] for line in output] == [["r.yaml:2:8", "model"], ["r.yaml:5:11", "stages.wit.kind"]]


LIKE_TYPES = (
    "int",
    "str",
    "bool",
    "list",
    "dict",
    "constrained-str",
    "function-after[f(), str]",
    "a[b]",
    "[key]",
    "x.y",
)
"""Keys that look like the names of types in pydantic's locations, or that contain the separators of dotted keys."""


@pytest.mark.parametrize("key", LIKE_TYPES)
def test_a_key_named_like_a_type_is_reported_at_its_own_location(
    folder: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    columns = GOOD.replace("{train: ./rows.jsonl}", f"{{train: ./rows.jsonl, columns: {{'{key}': 5}}}}")
    Path("r.yaml").write_text(columns)
    place, name = f"r.yaml:6:{columns.splitlines()[5].index(' 5}') + 2}: ", f"stages.wit.data.columns.{key}: "
    assert complain(capsys) == f"run-recipe: {place}{name}should be a valid string, found 5\n"
    Path("r.yaml").write_text(columns.replace(": 5}", ": answer}"))
    assert f"{place}{name}'{key}' is not a column" in complain(capsys)
    tasks = f"tasks: [{{task: arc_easy, data: {{'{key}': 5}}}}]"
    Path("r.yaml").write_text(GOOD.replace("tasks: [{task: arc_easy}]", tasks))
    assert f"stages.bench.tasks.0.data.{key}: should be a valid string, found 5" in complain(capsys)
    Path("r.yaml").write_text(GOOD.replace("{num_train_epochs: 1}", f"{{'{key}': 5}}"))
    assert f"r.yaml:8:13: stages.wit.train.{key}: unknown key" in complain(capsys)
    Path("r.yaml").write_text(GOOD.replace("{kind: report}", f"{{kind: report, runs: [{{run: x, '{key}': 5}}]}}"))
    assert f"stages.report.runs.0.{key}: unknown key" in complain(capsys)


def test_branches_of_unions_are_no_keys(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A value that fits none of several types has one error, at the value's own key."""
    Path("r.yaml").write_text(GOOD.replace("{num_train_epochs: 1}", "{lr_scheduler_kwargs: 5, report_to: {int: 1}}"))
    output = complain(capsys).splitlines()
    assert [line.split(": ")[2] for line in output] == [
        "stages.wit.train.lr_scheduler_kwargs",
        "stages.wit.train.report_to",
    ]


BROKEN = {
    "a required section": ("    weights: {prompt: 0.2, completion: 0.8}\n", ""),
    "a required value": ("{prompt: 0.2, completion: 0.8}", "{}"),
    "a wrong value": ("num_train_epochs: 1", "optim: 3"),
    "a wrong section": ("{num_train_epochs: 1}", "[1]"),
    "both weights 0": ("{prompt: 0.2, completion: 0.8}", "{prompt: 0, completion: 0}"),
    "options that do not go together": ("{num_train_epochs: 1}", "{bf16: true, fp16: true}"),
    "a wrong neighbour": ("train: ./rows.jsonl", "train: ./rows.jsonl, subset: 3, qqq: 4"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_references_of_a_stage_with_errors_are_checked(
    folder: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    before, after = BROKEN[case]
    bad = GOOD.replace(before, after, 1).replace("kind: sft", "kind: sft\n    model: wot").replace("./rows", "./row")
    Path("r.yaml").write_text(bad)
    keys = [line.split(": ")[2] for line in complain(capsys).splitlines()]
    assert {"stages.wit.model", "stages.wit.data.train"} < set(keys)
    assert len(keys) == len(set(keys))


def test_a_wrong_reference_is_no_reference_to_the_default(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Here to `base`, which this recipe does not have."""
    bad = GOOD.replace("model: ./model\n", "").replace("kind: sft", "kind: sft\n    model: 5").replace("[base, ", "[")
    Path("r.yaml").write_text(bad)
    assert [line.split(": ")[2] for line in complain(capsys).splitlines()] == ["stages.wit.model"]


def test_a_wrong_section_that_stages_share_is_reported_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = GOOD.replace("{train: ./rows.jsonl}", "&d {train: ./rows.jsonl, subset: 3}")
    Path("r.yaml").write_text(shared.replace("{train: ./pairs.jsonl}", "*d"))
    (line,) = complain(capsys).splitlines()
    error = "run-recipe: r.yaml:6:44: stages.wit.data.subset: should be a valid string, found 3"
    assert line == f"{error} (also stages.dpo.data.subset)"


def test_bad_data_of_several_stages_are_reported_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.jsonl").write_text('{"prompt": "a"}\n')
    Path("pairs.jsonl").write_text("{}\n")
    output = complain(capsys)
    assert "rows.jsonl:1: column 'completion'" in output
    assert "pairs.jsonl:1: column 'prompt'" in output


TARGETS = {
    "unknown name": ("[q_prj]", r"none of \['q_prj'\] is a module of the model; it has .*lm_head, .*q_proj"),
    "a name for a pattern": ("q_proj", r"'q_proj' matches no module of the model; write \[q_proj\] for the modules"),
    "bad pattern": ("'(('", r"'\(\(' is not a regular expression"),
    "unknown module": ("all-linear, modules_to_save: [router]", r"none of \['router'\] is a module of the model"),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets_missing_in_the_model(folder: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    tiny_model().config.save_pretrained("model")
    targets, expected = TARGETS[case]
    lora = f"train: {{num_train_epochs: 1}}\n    lora: {{target_modules: {targets}}}"
    Path("r.yaml").write_text(GOOD.replace("train: {num_train_epochs: 1}", lora).replace("arc_easy", "arc_eazy"))
    output = complain(capsys)
    assert re.search(r"r\.yaml:9:\d+: stages\.wit\.lora\.(target_modules|modules_to_save): " + expected, output), output
    assert "arc_eazy" in output


ROWS = {
    "empty data set": ("", r"rows\.jsonl: has no rows"),
    "row without prompt": (
        '{"prompt": "a", "completion": "b"}\n{"completion": "b"}\n',
        r"rows\.jsonl:2: column 'prompt'",
    ),
    "row without completion": (
        '{"prompt": "a"}\n',
        r"rows\.jsonl:1: column 'completion' is missing; the row has prompt",
    ),
    "empty completion": ('{"prompt": "a", "completion": " "}\n', r"rows\.jsonl:1: column 'completion' is empty"),
    "number for text": ('{"prompt": "a", "completion": 3}\n', r"rows\.jsonl:1: column 'completion' is int, not text"),
    "not JSON": ('{"prompt": "a", "completion": "b"}\n{"prompt"\n', r"rows\.jsonl:2: not valid JSON"),
    "unknown columns": ('{"question": "a", "reply": "b"}\n', r"columns question, reply fit no format"),
    "not an object": ('["a", "b"]\n', r"rows\.jsonl:1: is list, not an object"),
    "message without role": (
        '{"prompt": [{"content": "a"}], "completion": "b"}\n',
        r"rows\.jsonl:1: .*'role' and 'content'",
    ),
    "not UTF-8": (b'{"prompt": "\xff", "completion": "b"}\n', r"rows\.jsonl: is not UTF-8 text"),
    "half a surrogate": ('{"prompt": "a", "completion": "\\ud800"}\n', r"rows\.jsonl:1: .*surrogate"),
    "deep nesting": ("[" * 100_000 + "\n", r"rows\.jsonl:1: not valid JSON: maximum recursion depth"),
    "unknown ShareGPT speaker": (
        '{"conversations": [{"from": "human", "value": "a"}, {"from": "bing", "value": "b"}]}\n',
        r"rows\.jsonl:1: column 'conversations' has a turn from 'bing'; use one of .*human.*gpt",
    ),
    "conversation without an answer": (
        '{"messages": [{"role": "user", "content": "a"}]}\n',
        r"rows\.jsonl:1: column 'messages' has no assistant message",
    ),
    "pre-tokenised row without weights": (
        '{"input_ids": [1, 2], "loss_weights": [1]}\n',
        r"rows\.jsonl:1: has 2 input_ids but 1 loss_weights",
    ),
    "mixed kinds": (
        '{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}\n',
        r"rows\.jsonl:1: prompt and completion mix text and messages",
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_bad_rows(folder: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    text, expected = ROWS[case]
    Path("rows.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    output = complain(capsys, "--stage", "wit")
    assert re.search(expected, output), output


@pytest.mark.parametrize("name", ["rows.parquet", "rows.csv", "rows.json", "folder.jsonl"])
def test_broken_files(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    if name == "folder.jsonl":
        Path(name).mkdir()
        (Path(name) / "file").write_text("x")
    else:
        Path(name).write_bytes(b"prompt,completion\na,b,c\n" if name == "rows.csv" else b"\x00\x01 nonsense")
    Path("r.yaml").write_text(GOOD.replace("./rows.jsonl", f"./{name}"))
    assert name in complain(capsys, "--stage", "wit")


def test_an_unknown_split_of_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("set").mkdir()
    Path("rows.jsonl").rename("set/train.jsonl")
    Path("r.yaml").write_text(GOOD.replace("{train: ./rows.jsonl}", "{train: ./set, eval: ./set}"))
    output = complain(capsys, "--stage", "wit")
    assert re.search(r"set: has no split 'test'; set data\.train_split or data\.eval_split to one of: train", output)


def test_dropped_rows_are_no_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With `drop` the bad row is skipped, and the error is in the file of the next stage."""
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt"\n')
    Path("pairs.jsonl").write_text("{}\n")
    drop = "{train: ./rows.jsonl, on_bad_row: drop}"
    Path("r.yaml").write_text(GOOD.replace("{train: ./rows.jsonl}", drop))
    output = complain(capsys)
    assert "rows.jsonl" not in output
    assert "pairs.jsonl:1: column 'prompt' is missing" in output


def test_unknown_task(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """lm-eval's own list is checked before any training."""
    Path("r.yaml").write_text(GOOD.replace("arc_easy", "arc_eazy"))
    output = complain(capsys)
    assert re.search(
        r"r\.yaml:16:20: stages\.bench\.tasks\.0\.task: lm-eval knows no .*'arc_eazy'.*arc_easy", output
    ), output


def test_errors_of_an_extended_recipe_are_at_their_place_and_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("base.yaml").write_text("name: small\nstages: [\n")
    Path("r.yaml").write_text("extends: base.yaml\n")
    (line,) = complain(capsys).splitlines()
    assert line.startswith("run-recipe: base.yaml:3:1: not valid YAML"), line


def test_bad_benchmark_items(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("items.jsonl").write_text('{"question": 1}\n{"question\n')
    Path("r.yaml").write_text(GOOD.replace("{task: arc_easy}", "{task: arc_easy, data: {test: ./items.jsonl}}"))
    assert "items.jsonl:2: not valid JSON" in complain(capsys)


def test_a_byte_order_mark_is_no_part_of_the_data(folder: Path) -> None:
    Path("rows.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\n')
    assert list(read_rows(Path("rows.jsonl"))) == [(1, {"prompt": "a", "completion": "b"})]


def test_bad_preference_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n{"prompt": "a", "chosen": "b"}\n')
    Path("r.yaml").write_text(GOOD.replace("model: wit", "model: base"))
    output = complain(capsys, "--stage", "dpo")
    assert re.search(r"pairs\.jsonl:1: chosen and rejected are the same", output)
    assert re.search(r"pairs\.jsonl:2: column 'rejected' is missing", output)


COMMANDS = {
    "unknown stage": (("--stage", "wti"), r"--stage wti: the recipe has no such stage; did you mean 'wit'"),
    "override without a value": (("--set", "seed"), r"--set seed: write --set KEY=VALUE"),
    "override of an unknown key": (
        ("--set", "stages.wit.weights.promt=1"),
        r"--set stages\.wit\.weights\.promt=1: .*'prompt'",
    ),
    "override in an unknown section": (
        ("--set", "stages.wit.weight.prompt=1"),
        r"--set stages\.wit\.weight\.prompt=1: stages\.wit\.weight: unknown key; did you mean 'weights'",
    ),
    "override of a wrong type": (("--set", "seed=soon"), r"--set seed=soon: seed: .*integer.*'soon'"),
    "inputs not made yet": (("--stage", "dpo"), r"dpo needs wit: no result yet; make it first by .*--stage wit"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_bad_command(folder: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    arguments, expected = COMMANDS[case]
    output = complain(capsys, *arguments)
    assert re.search(expected, output), output


def test_missing_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("binary.yaml").write_bytes(b"name: \xff")
    assert main(["binary.yaml"]) == 2
    assert "binary.yaml: cannot be read: it is not UTF-8 text" in capsys.readouterr().err
    assert main(["."]) == 2
    assert ".: is a folder" in capsys.readouterr().err
    assert main(["s.yaml"]) == 2
    assert f"s.yaml: no such file or folder; {folder} has r.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["metadata", "padding", "bf32", "gamma", "temperatur", "weight", "lambda_x", "ppo"])
def test_nothing_unrelated_is_suggested(folder: Path, capsys: pytest.CaptureFixture[str], word: str) -> None:
    Path("r.yaml").write_text(GOOD.replace("num_train_epochs: 1", f"{word}: 1"))
    assert "did you mean" not in complain(capsys)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("-", "-: a recipe is a file, because relative paths start from its folder"),
        ("/dev/stdin", "/dev/stdin: a recipe is a file"),
        (".", ".: is a folder; name a recipe in it: r.yaml"),
        ("r.yml", "r.yml: no such file or folder; "),
        ("rows.jsonl", "rows.jsonl:1:1: a recipe is a mapping"),
        ("r.toml", "a recipe is a YAML file"),
        ("r.yaml --stges wit", "unknown argument '--stges'; did you mean '--stage'?"),
        ("r.yaml --stage wot", "--stage wot: the recipe has no such stage; did you mean 'wit'?"),
    ],
)
def test_a_wrong_command_line(folder: Path, capsys: pytest.CaptureFixture[str], name: str, expected: str) -> None:
    Path("r.toml").write_text('[stages]\nwit = "a"\n')
    Path("rows.jsonl").write_text('["a"]\n')
    assert main([*name.split(), "--plan"]) == 2
    assert expected in capsys.readouterr().err


def test_the_same_error_is_said_once_with_a_count(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.jsonl").write_text('{"prompt": "a "}\n')
    cells = GOOD.replace("stages:", "matrix: {p: [0, 0.1, 0.2]}\nstages:").replace(
        "prompt: 0.2", "prompt: '${matrix.p}'"
    )
    Path("r.yaml").write_text(cells.replace("./pairs.jsonl}", "./rows.jsonl, rejected: other_row}"))
    (line,) = [line for line in complain(capsys).splitlines() if "rows.jsonl" in line]
    assert line.endswith("rows.jsonl:1: column 'completion' is missing; the row has prompt (in 6 steps)")
    Path("r.yaml").write_text(
        GOOD.replace("pairs.jsonl}", "pairs.jsonl}\n    train: {epochs: 1}").replace("num_train_", "")
    )
    (line,) = complain(capsys).splitlines()
    assert "r.yaml:8:13: stages.wit.train.epochs: unknown key" in line
    assert line.endswith("(also stages.dpo.train.epochs (line 13))")


def test_errors_are_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def errors(*arguments: str) -> list[tuple[object, ...]]:
        assert main([*arguments, "--json"]) == 2
        output = capsys.readouterr()
        assert re.fullmatch(r"(checking \d steps: .*\n)?", output.err)
        return [(error["file"], error["line"], error["key"]) for error in json.loads(output.out)["error"]]

    Path("r.yaml").write_text(GOOD.replace("0.2", "-1").replace("num_train_epochs", "epochs"))
    keys = ["stages.wit.weights.prompt", "stages.wit.train.epochs"]
    assert sorted(errors("r.yaml", "--plan")) == [("r.yaml", 7, keys[0]), ("r.yaml", 8, keys[1])]
    assert errors("r.yaml", "--no-such-option") == [(None, None, None)]
    Path("r.yaml").write_text(GOOD)
    Path("rows.jsonl").write_text('{"prompt": "a "}\n')
    told = errors("r.yaml")
    assert told.count((str(folder / "rows.jsonl"), 1, None)) == 1
    assert ("r.yaml", 16, "stages.bench.tasks.0.task") in told, "errors of tasks are reported with those of rows"


def test_a_closed_pipe_ends_the_command_silently(folder: Path) -> None:
    command = f"{sys.executable} -m pipeline.cli r.yaml --plan --json | true; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.parametrize(
    ("redirection", "code", "message"),
    [(">&-", 0, ""), (">/dev/full", 1, "run-recipe: standard output: cannot be written: No space left on device\n")],
)
def test_a_standard_output_that_takes_nothing(folder: Path, redirection: str, code: int, message: str) -> None:
    command = f"{sys.executable} -m pipeline.cli r.yaml --plan --json {redirection}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stderr) == (code, message)
