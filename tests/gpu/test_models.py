"""Published models in vLLM, and Liger's kernels, on a CUDA device: `pytest -m gpu tests/gpu/test_models.py`.

They need `pip install '.[vllm]'` and `pip install liger-kernel`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline

from tests.stages.training.test_kernels import losses
from tests.stages.training.test_lora import TRAIN, sft
from tests.tiny import byte_tokenizer

pytestmark = pytest.mark.gpu
ON_GPU = TRAIN | {"use_cpu": False, "bf16": False, "max_steps": 4}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose heads are of a size that vLLM's and Liger's kernels take."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_vllm_answers_as_transformers_does(tmp_path: Path, model: Path, lora: dict | None) -> None:
    from vllm import LLM, SamplingParams

    out = sft(tmp_path / "s", model, train=ON_GPU, lora=lora)
    messages = [{"role": "user", "content": "Sky? "}]
    served = LLM(model=str(out), dtype="float32", gpu_memory_utilization=0.3, max_model_len=64)
    answer = served.chat(messages, SamplingParams(temperature=0, max_tokens=4))[0].outputs[0]
    generator = pipeline("text-generation", model=str(out), device="cuda")
    expected = generator(messages, max_new_tokens=4, do_sample=False)[0]["generated_text"][1]["content"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(answer.token_ids, skip_special_tokens=True) == expected


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_liger_changes_no_loss(tmp_path: Path, model: Path, lora: dict | None) -> None:
    pytest.importorskip("liger_kernel")
    train = ON_GPU | {"tf32": False}
    plain = sft(tmp_path / "plain", model, train=train, lora=lora)
    liger = sft(tmp_path / "liger", model, train=train | {"use_liger_kernel": True}, lora=lora)
    assert losses(liger) == pytest.approx(losses(plain), abs=1e-3)
