"""Make a small Qwen2 with random weights, for machines without GPU and network.

    python scripts/make_tiny_model.py checkpoints/tiny_qwen2

The folder has the files of a real Hugging Face model. Everything that code may depend on is like Qwen2.5: the
pre-tokenizer, the 22 added tokens in their order, the chat template, tied embeddings, a padded vocabulary, bfloat16
weights; only the sizes are smaller. The byte-level BPE is trained on the toy data. Every call makes the same model.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from arpo_trl.data.tokenizer import shipped_template

ROOT = Path(__file__).resolve().parents[1]
TOY_DATA = ROOT / "recipes" / "data" / "arpo_sft_toy.jsonl"

# The next three constants are from https://huggingface.co/Qwen/Qwen2.5-0.5B-Instruct/blob/main/tokenizer.json
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
WHOLE_WORDS = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
).split()


def texts(data: Path, rows: int) -> Iterator[str]:
    with data.open(encoding="utf-8") as lines:
        for _, line in zip(range(rows), lines):
            row = json.loads(line)
            yield row["system"]
            yield from (turn["value"] for turn in row["conversations"])


def train_tokenizer(data: Path, rows: int, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts(data, rows), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in WHOLE_WORDS])
    return tokenizer


def make_model(tokenizer: Tokenizer, hidden_size: int, layers: int, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=-(-tokenizer.get_vocab_size() // 64) * 64,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id("<|endoftext|>"),
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=[config.eos_token_id, config.bos_token_id],
        pad_token_id=config.bos_token_id,
    )
    return model


def save(tokenizer: Tokenizer, model: Qwen2ForCausalLM, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(shipped_template("qwen"), encoding="utf-8", newline="")
    config = {
        "additional_special_tokens": SPECIAL_TOKENS[1:],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    tokenizer = train_tokenizer(TOY_DATA, rows=500, vocab_size=2048)
    model = make_model(tokenizer, hidden_size=128, layers=4, seed=0)
    save(tokenizer, model, args.folder)
    print(f"{args.folder}: {model.num_parameters():,} parameters, {tokenizer.get_vocab_size():,} tokens")


if __name__ == "__main__":
    main()
