"""A .gguf file converted to a model folder: same logits, tokens and chat template; padding does not end a turn."""

import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.base import UserError
from stages.models.gguf import to_safetensors

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
CHARACTERS = [chr(b) for b in BYTES] + [chr(256 + n) for n in range(256 - len(BYTES))]  # GPT-2's name of each byte
VOCABULARY = [*SPECIAL, *CHARACTERS, "he", "ll"]
WIDTH, HEADS, LAYERS, INNER = 64, 2, 2, 96


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """A Llama of two layers with a byte-level vocabulary, quantised to 8 bits like real .gguf files."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(VOCABULARY))
    _add_tokenizer(writer)
    _add_weights(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    kinds = [gguf.TokenType.CONTROL] * len(SPECIAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * (len(VOCABULARY) - len(kinds)))
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)


def _add_weights(writer: gguf.GGUFWriter) -> None:
    draw = np.random.default_rng(23)

    def add(name: str, *shape: int) -> None:
        values = draw.normal(0, 0.1, shape).astype(np.float32)
        q8 = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, q8), raw_dtype=q8)

    add("token_embd", len(VOCABULARY), WIDTH)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, dtype=np.float32))
    for i in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{i}.{name}", WIDTH, WIDTH)
        add(f"blk.{i}.ffn_gate", INNER, WIDTH)
        add(f"blk.{i}.ffn_up", INNER, WIDTH)
        add(f"blk.{i}.ffn_down", WIDTH, INNER)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(WIDTH, dtype=np.float32))


@pytest.fixture(scope="module")
def folder(file, tmp_path_factory) -> Path:
    return to_safetensors(file, tmp_path_factory.mktemp("cache"))


def test_the_folder_computes_the_same_as_the_file(file, folder):
    plain = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    assert plain.dtype == torch.float32
    assert not hasattr(plain.config, "quantization_config")
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(plain(tokens).logits, quantised(tokens).logits)


def test_text_comes_back_from_its_tokens_and_turns_from_the_template(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "hello  wörld\n"}, {"role": "assistant", "content": "日本 12"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == ("<|im_start|>user\nhello  wörld\n<|im_end|>\n<|im_start|>assistant\n日本 12<|im_end|>\n")
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids[0] == 1  # <|im_start|> is one token
    assert "he" in tokenizer.convert_ids_to_tokens(ids)  # and the merges are used


def test_padding_is_not_the_token_that_ends_a_turn(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 0


def test_a_file_is_converted_once_and_cached_by_its_content(file, folder, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("converted again")

    monkeypatch.setattr("stages.models.gguf._convert", never)
    copy = tmp_path / "another name.gguf"
    copy.write_bytes(file.read_bytes())
    os.utime(copy, (0, 0))
    assert to_safetensors(copy, folder.parents[1]) == folder


def test_a_broken_file_leaves_nothing_behind(tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but no more")
    with pytest.raises(UserError, match=r"broken\.gguf: transformers cannot read"):
        to_safetensors(broken, tmp_path / "cache")
    assert [p for p in (tmp_path / "cache" / "gguf").iterdir() if p.suffix != ".lock"] == []
