"""Hostile recipes, models, tasks and data files, through the command."""

from __future__ import annotations

import json
import pickle
import re
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from pipeline.cli import main
from tests.pipeline.run.test_command import TASK, command, states, write_world

pytestmark = pytest.mark.long

CODE = """\
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from .helper_own import MARKER

Path(MARKER).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        if output.logits is not None:
            output.logits = output.logits * 0.5
        return output
"""
RECIPE = """\
name: small
model: ./own
stages:
  wit:
    kind: sft
    data: {train: ./rows.jsonl}
    weights: {prompt: 0.2, completion: 0.8}
    train: &train {max_steps: 1, per_device_train_batch_size: 2, logging_steps: 1, log_level: debug}
    lora: {r: 2, target_modules: [q_proj]}
    trust_remote_code: true
  dpo:
    kind: dpo
    model: wit
    data: {train: ./rows.jsonl, rejected: other_row}
    train: *train
    trust_remote_code: true
  bench:
    kind: lm_eval
    models: [dpo]
    include_path: ./tasks
    tasks: [{task: colours, data: {test: ./items.jsonl}}]
    trust_remote_code: true
  report: {kind: report, benchmarks: [bench]}
  talkative:
    kind: lm_eval
    models: [base]
    include_path: ./talkative
    tasks: [{task: talkative, data: {test: ./items.jsonl}}]
    trust_remote_code: true
"""
TALKATIVE = """\
import os, sys

def tell(doc):
    print(os.environ["HF_TOKEN"], file=sys.stderr, flush=True)
    if not doc["question"].startswith("Coal"):  # the last item: the check before the run reads the first
        return doc["question"]
    raise RuntimeError("no luck with " + os.environ["OPENAI_API_KEY"])
"""
PLANTED = ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "SOMETHING_ELSE")
RUNS_OWN = "trust_remote_code: the model's own Python files run"


def own_model(folder: Path, model: Path) -> Path:
    """Write the tiny model as `own`, which needs the Python files in its folder; return the file that they touch."""
    marker = folder / "imported"
    shutil.copytree(model, folder / "own")
    (folder / "own" / "modeling_own.py").write_text(CODE)
    (folder / "own" / "helper_own.py").write_text(f"MARKER = {str(marker)!r}\n")
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    change_config(folder / "own", model_type="own", architectures=["OwnForCausalLM"], auto_map=auto_map)
    return marker


def change_config(model: Path, **changes: Any) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(scope="module")
def planted() -> Iterator[dict[str, str]]:
    """Environment variables and their random values."""
    values = {name: f"{name.lower()}-{secrets.token_hex(12)}" for name in PLANTED}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield values


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, planted: dict[str, str]) -> Path:
    """A folder in which RECIPE ran, with one failing stage, in the planted environment."""
    folder = tmp_path_factory.mktemp("ran")
    write_world(folder, model_folder)
    own_model(folder, model_folder)
    (folder / "talkative").mkdir()
    (folder / "talkative" / "t.py").write_text(TALKATIVE)
    task = TASK.replace("colours", "talkative").replace("doc_to_text: question", "doc_to_text: !function t.tell")
    (folder / "talkative" / "talkative.yaml").write_text(task)
    (folder / "r.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MODULES_CACHE", str(folder / "modules"))
        patch.setenv("LOGLEVEL", "DEBUG")
        process = command(folder, "--set", "seed=5", "--runs", "runs")
    (folder / "output.txt").write_text(process.stdout + process.stderr)
    assert process.returncode == 1, process.stdout + process.stderr
    return folder


@pytest.fixture
def world(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a small recipe, in the current folder; the model is `own`."""
    write_world(tmp_path, model_folder)
    own_model(tmp_path, model_folder)
    (tmp_path / "r.yaml").write_text(RECIPE[: RECIPE.index("  talkative:")])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command, which must exit with 2 before any step runs, and return its error message."""

    def call(*arguments: str) -> str:
        assert main(["r.yaml", *arguments]) == 2
        assert not Path("runs/small").exists()
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        return output.err

    return call


# ------------------------------------------------------------------------------------------------ remote code


def test_a_models_own_code_runs_where_its_key_is_set(ran: Path) -> None:
    expected = dict.fromkeys(("wit", "dpo", "bench[dpo]", "report"), "done") | {"talkative[base]": "failed"}
    assert states(ran) == expected, (ran / "output.txt").read_text()
    assert (ran / "imported").exists()
    assert not (ran / "modules").exists(), "each worker has its own copy of the code"
    for name in ("wit", "dpo"):
        folder = ran / "runs" / "small" / name
        assert {"modeling_own.py", "helper_own.py"} <= {file.name for file in folder.iterdir()}
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__name__ == "OwnForCausalLM"
    log = (ran / "runs/small/dpo/training_log.jsonl").read_text().splitlines()
    assert json.loads(log[0])["loss"] == pytest.approx(0.6931472, abs=1e-6)  # ln 2: the reference is the same model


def test_a_published_model_needs_the_key_again(
    ran: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ran)
    assert main(["r.yaml", "--set", "seed=5", "--stage", "dpo", "--set", "stages.dpo.trust_remote_code=false"]) == 2
    output = capsys.readouterr().err
    assert re.search(r"r\.yaml:\d+:\d+: stages\.dpo\.model: .*/sft/\w+ is loaded by its own Python files", output)


def test_a_models_own_code_does_not_run_without_the_key(world: Path, refused: Callable[..., str]) -> None:
    """Checked before any step runs, for existing models and models to be trained."""
    stages = {"wit": "model", "dpo": "model", "bench": "models"}
    output = refused(*(word for stage in stages for word in ("--set", f"stages.{stage}.trust_remote_code=false")))
    assert all(f"stages.{stage}.{key}" in output for stage, key in stages.items())
    assert "own is loaded by its own Python files (modeling_own.OwnConfig" in output
    assert "set trust_remote_code: true on the stage" in output
    assert not (world / "imported").exists()


def test_previews_and_plans_do_not_run_a_models_own_code(world: Path, refused: Callable[..., str]) -> None:
    assert "set trust_remote_code: true" in refused("--preview", "1", "--set", "stages.wit.trust_remote_code=false")
    assert main(["r.yaml", "--plan"]) == 0
    assert not (world / "imported").exists()


def test_code_from_another_repository_is_refused(world: Path, refused: Callable[..., str]) -> None:
    change_config(world / "own", auto_map={"AutoConfig": "org/other--modeling_own.OwnConfig"})
    assert "its code, org/other--modeling_own.OwnConfig, is not in its own folder" in refused()


def test_unused_code_needs_no_key(world: Path, model_folder: Path) -> None:
    """transformers knows the type and ignores the folder's code."""
    change_config(world / "own", model_type="llama", architectures=["LlamaForCausalLM"])
    trust = [f"--set=stages.{stage}.trust_remote_code=false" for stage in ("wit", "dpo", "bench")]
    assert main(["r.yaml", "--preview", "1", *trust]) == 0
    assert not (world / "imported").exists()


def test_kernels_from_the_hub_need_the_key(world: Path, refused: Callable[..., str]) -> None:
    recipe = RECIPE.replace("    trust_remote_code: true\n", "")
    for value in ("attn_implementation: org/kernel", "use_kernels: true"):
        Path("r.yaml").write_text(recipe.replace("log_level: debug", f"model_init_kwargs: {{{value}}}"))
        assert "kernels from the hub, which are third-party code; add trust_remote_code: true" in refused()


# ---------------------------------------------------------------------------------- third-party code in the plan


def test_the_plan_shows_third_party_code(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "tasks" / "t.py").write_text("")
    arguments = ["r.yaml", "--plan", "--set", "stages.bench.options.confirm_run_unsafe_code=true"]
    expected = [
        RUNS_OWN,
        "options.confirm_run_unsafe_code: code that the model writes runs",
        "include_path: Python of the tasks in ./tasks runs; it can read files that are not tracked",
    ]
    assert main([*arguments, "--json"]) == 0
    steps = {step["step"]: step["runs_code"] for step in json.loads(capsys.readouterr().out)["steps"]}
    assert steps == {"wit": [RUNS_OWN], "dpo": [RUNS_OWN], "bench[dpo]": expected, "report": []}
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert all(f"runs code bench[dpo]: {line}" in output for line in expected)


def test_tasks_that_run_what_the_model_wrote(world: Path, refused: Callable[..., str]) -> None:
    (world / "tasks" / "colours.yaml").write_text(TASK + "unsafe_code: true\n")
    output = refused()
    assert re.search(r"r\.yaml:\d+:\d+: stages\.bench\.tasks\.0\.task: colours runs code that the model wrote", output)
    assert "set options.confirm_run_unsafe_code: true" in output


# ---------------------------------------------------------------------------------------------------- secrets


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every file below `folder`, and of every member of those that are archives."""
    for file in folder.rglob("*"):
        if file.is_file():
            yield str(file), file.read_bytes()
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    yield from ((f"{file}:{name}", archive.read(name)) for name in archive.namelist())


def test_no_secret_is_written_anywhere(ran: Path, planted: dict[str, str]) -> None:
    """Even if a task's Python prints it and raises it."""
    files = dict(contents(ran / "runs"))
    assert len(files) > 30
    leaks = {(name, variable) for name, data in files.items() for variable, v in planted.items() if v.encode() in data}
    assert not leaks
    log = (ran / "runs/small/logs/talkative[base].txt").read_text()
    assert "***" in log
    assert "no luck with ***" in (ran / "runs/small/run.json").read_text()
    assert not any(value in (ran / "output.txt").read_text() for value in planted.values())


def test_a_secret_in_a_recipe_is_refused(world: Path, planted: dict[str, str], refused: Callable[..., str]) -> None:
    """As a shell expands it: --set stages.bench.options.system_instruction=$HF_TOKEN."""
    output = refused("--set", f"stages.bench.options.system_instruction=x {planted['HF_TOKEN']}")
    assert "stages.bench.options.system_instruction: contains the secret of the environment variable HF_TOKEN" in output
    assert planted["HF_TOKEN"] not in output


@pytest.mark.usefixtures("planted")
def test_the_command_is_recorded_without_secrets(monkeypatch: pytest.MonkeyPatch, planted: dict[str, str]) -> None:
    from pipeline.store.provenance import environment

    environment.cache_clear()
    monkeypatch.setattr("sys.argv", ["/bin/run-recipe", "r.yaml", "--runs", planted["HF_TOKEN"]])
    assert environment()["command"] == ["run-recipe", "r.yaml", "--runs", "***"]
    environment.cache_clear()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("${oc.env:HF_TOKEN}", "'${oc.env:HF_TOKEN}': there is no oc"),
        ("${oc.decode:${oc.env:HF_TOKEN}}", "'${' is not closed by '}'"),
        ("./$HF_TOKEN", "HF_TOKEN': no such path; recipes read no environment variables"),
        ("./${HF_TOKEN}", "'${HF_TOKEN}': there is no HF_TOKEN"),
    ],
)
def test_a_recipe_cannot_read_the_environment(
    world: Path, planted: dict[str, str], refused: Callable[..., str], model: str, message: str
) -> None:
    for recipe in (RECIPE.replace("./own", f"'{model}'"), f"extends: '{model}'\n" + RECIPE):
        Path("r.yaml").write_text(recipe)
        output = refused()
        assert message in output or "no such file or folder" in output
        assert planted["HF_TOKEN"] not in output


# ------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("name", ["../x", "/x", ".x", "..", "a/b", "x" * 101, "ü", "a\nb", "cache", ""])
def test_names_stay_in_the_runs_folder(world: Path, refused: Callable[..., str], name: str) -> None:
    quoted = json.dumps(name)
    Path("r.yaml").write_text(RECIPE.replace("name: small", f"name: {quoted}"))
    assert "is no folder name" in refused()
    if name != "cache":
        Path("r.yaml").write_text(RECIPE.replace("  wit:", f"  {quoted}:").replace("model: wit", "model: base"))
        assert "is no stage name" in refused()


def test_any_reference_to_a_model_makes_one_file_name(world: Path, model_folder: Path) -> None:
    """A path of 500 characters that leaves the folder, and a task name of 300."""
    deep = "/".join(["d" * 60] * 4)
    shutil.copytree(model_folder, world / deep / "m")
    reference = f"./{deep}/../../../../" + "./" * 100 + f"{deep}/m"
    (world / "tasks" / "colours.yaml").write_text(TASK.replace("task: colours", f"task: {'t' * 300}"))
    tasks = f"[{{task: {'t' * 300}, data: {{test: ./items.jsonl}}}}]"
    bench = f"{{kind: lm_eval, models: ['{reference}'], include_path: ./tasks, tasks: {tasks}}}"
    Path("r.yaml").write_text(f"name: small\nstages:\n  bench: {bench}\n")
    before = {path for path in world.rglob("*") if "runs" not in path.parts}
    process = command(world)
    assert process.returncode == 0, process.stdout + process.stderr
    assert {path for path in world.rglob("*") if "runs" not in path.parts} == before
    names = {path.name for path in (world / "runs").rglob("*")}
    assert max(len(name.encode()) for name in names) <= 160
    (link,) = (path for path in (world / "runs/small").iterdir() if path.is_symlink())
    assert link.name.startswith("bench[._ddd")
    assert (link / "results.json").is_file()


# ------------------------------------------------------------------------------------- weights and the terminal


class Marks:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("arguments", [(), ("--preview", "1")])
def test_pickles_are_never_read(world: Path, refused: Callable[..., str], arguments: tuple[str, ...]) -> None:
    (world / "own" / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "adapter_model.bin", "tokenizer.pkl", "training_args.bin"):
        (world / "own" / name).write_bytes(pickle.dumps(Marks(world / "unpickled")))
    output = refused(*arguments)
    assert "has no *.safetensors weights, only adapter_model.bin, pytorch_model.bin" in output
    assert re.search(r"r\.yaml:\d+:\d+: stages\.wit\.model: ", output)
    index = {"weight_map": {"lm_head.weight": "../own/pytorch_model.bin"}}
    (world / "own" / "model.safetensors.index.json").write_text(json.dumps(index))
    (world / "own" / "other.safetensors").touch()
    assert "names '../own/pytorch_model.bin', not a *.safetensors in its folder" in refused(*arguments)
    (world / "own" / "adapter_config.json").write_text("{}")
    assert re.search(r"r\.yaml:2:8: model: .*own holds an adapter; merge it into its model", refused(*arguments))
    assert not (world / "unpickled").exists()


def test_pickles_of_a_benchmarked_model_are_never_read(world: Path, refused: Callable[..., str]) -> None:
    (world / "model" / "model.safetensors").unlink()
    (world / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Marks(world / "unpickled")))
    output = refused("--set", "stages.bench.models=[./model]")
    assert re.search(r"stages\.bench\.models: .*only pytorch_model\.bin, and pickles run code", output)
    assert not (world / "unpickled").exists()


def test_data_cannot_control_the_terminal(world: Path, refused: Callable[..., str]) -> None:
    row = {"prompt": "a", "com\x1b[2Jpletion": "b"}
    (world / "rows.jsonl").write_text(json.dumps(row) + "\n")
    output = refused()
    assert "\x1b" not in output
    assert "com<U+001B>[2Jpletion" in output


EVIL = ["<script>alert(1)</script>", '"onmouseover="alert(1)', "]]><b>", "</style></title><i>"]
EVIL += ["\x1b[2J\x1b]0;title\x07"]


def test_rows_are_escaped_in_the_preview(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rows' tools and their file's name are escaped, too."""
    template = (
        "{% for t in tools %}{{ t['name'] }}{% endfor %}{% for m in messages %}{{ m['content'] }}{% endfor %}<end>"
    )
    (world / "own" / "chat_template.jinja").write_text(template)
    rows = [
        {
            "messages": [{"role": "user", "content": evil}, {"role": "assistant", "content": evil}],
            "tools": [{"name": evil}],
        }
        for evil in EVIL
    ]
    file = world / "<b>\x1b[2J.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = f"--set=stages.wit.data.train={json.dumps(str(file))}"
    assert main(["r.yaml", "--preview", "5", train]) == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert "\x07" not in output
    page = Path("runs/small/preview/wit.html").read_text()
    shown = re.sub(r"<[^>]*>", "", page)  # tokens are letters, each in its own element
    assert all(one in shown for one in ("&lt;script&gt;alert(1)&lt;/script&gt;", "]]&gt;&lt;b&gt;", "&lt;/style&gt;"))
    tags = {tag.split()[0] for tag in re.findall(r"<[a-z!/][^>]*", page)}
    assert not tags & {"<script", "</script", "</i></title"}
    assert page.count("</style>") == page.count("</title>") == 1
    assert "onmouseover=" not in page
