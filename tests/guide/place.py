"""The folder that the guide's blocks run in: a Hugging Face cache with a small model, documents under the guide's paths."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
MODELS = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.8B", "Qwen/Qwen3-7B")  # the last two stand in the guide alone
FOLDERS = (
    "documents", "research_papers", "medical_documents", "legal_docs", "legal_cases", "company_docs", "chemistry_papers",
    "your_data", "my_documents",
)  # fmt: skip


def prepare(place: Path) -> None:
    """What every block finds: a cache of models, once."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        text(random.Random(1), 4000).split("."), trainers.BpeTrainer(
            vocab_size=512, special_tokens=["<|endoftext|>", "<|pad|>"], initial_alphabet=alphabet, show_progress=False
        )
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|pad|>")
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16, max_position_embeddings=8192, tie_word_embeddings=True,
        eos_token_id=0, bos_token_id=None, pad_token_id=1,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    for name in MODELS:
        root = place / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = root / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text(snapshot.name)
        model.save_pretrained(snapshot)
        tokenizer.save_pretrained(snapshot)


WORDS = (
    "river", "court", "ruling", "patient", "dose", "compound", "reaction", "theorem", "ledger", "invoice", "meeting",
    "protocol", "notes", "evidence",
)  # fmt: skip


def text(draw: random.Random, words: int) -> str:
    """Sentences of made-up prose."""
    said = [draw.choice(WORDS) for _ in range(words)]
    return " ".join(word + ("." if i % 9 == 8 else "") for i, word in enumerate(said)) + "."


def fill(folder: Path) -> None:
    """Documents of every format under each path, and train.py."""
    draw = random.Random(7)
    for name in FOLDERS:
        place = folder / name / "notes"
        place.mkdir(parents=True)
        for i in range(3):
            (place / f"{i}.txt").write_text(text(draw, 150))
        (folder / name / "articles.jsonl").write_text(
            "".join(json.dumps({key: text(draw, 60)}) + "\n" for key in ("text", "content"))
            + json.dumps({"input": "What is the dose?", "output": text(draw, 8)}) + "\n"
        )  # fmt: skip
        (folder / name / "papers.json").write_text(json.dumps([{"text": text(draw, 80)}, {"body": text(draw, 80)}]))
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps({"text": text(draw, 90)}) + "\n" for _ in range(6)))
    shutil.copy(REPOSITORY / "train.py", folder)
