"""Every shipped recipe plans without a network, and the embedded base model is the one its recipe makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if "tasks" not in path.parts)
POCKET = ROOT / "recipes" / "pocket"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_it_plans_without_a_hub(recipe: Path, tmp_path: Path) -> None:
    call = [sys.executable, "-m", "pipeline.cli", str(recipe), "--plan", "--json", "--runs", str(tmp_path / "runs")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    steps = json.loads(done.stdout)["steps"]
    assert {step["state"] for step in steps} == {"run"}
    on_the_hub = "paper" in recipe.parts and recipe.stem not in ("figure1", "tables")  # which need no model
    assert all((step["fingerprint"] is None) == on_the_hub for step in steps)
    assert not (tmp_path / "runs").exists()


def test_the_embedded_model_is_small_and_of_its_recipes_architecture() -> None:
    assert (POCKET / "model" / "model.safetensors").stat().st_size <= 5_000_000
    init, trained = (json.loads((POCKET / folder / "config.json").read_text()) for folder in ("init", "model"))
    shape = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    assert {key: trained[key] for key in shape} == {key: init[key] for key in shape}


def test_the_embedded_model_knows_the_text_it_was_trained_on() -> None:
    """Its tokenizer is that of init/, and it predicts the pretraining text far better than chance, ln 1024 = 6.9."""
    tokenizers = [AutoTokenizer.from_pretrained(POCKET / folder) for folder in ("init", "model")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    model = AutoModelForCausalLM.from_pretrained(POCKET / "model").eval()
    with (POCKET / "data" / "pretrain.jsonl").open() as file:
        texts = [json.loads(line)["text"] for _, line in zip(range(32), file, strict=False)]
    with torch.no_grad():
        losses = []
        for text in texts:
            ids = torch.tensor([tokenizers[1](text)["input_ids"]])
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert sum(losses) / len(losses) < 1.0
