"""The guide's objects: a loop of one's own is a run's pieces, and works with those of transformers."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanovllm import LLM, SamplingParams, Trainer, TrainingConfig
from nanovllm.training import (
    CustomTokenizer,
    MultiDocumentDataset,
    collate,
    create_optimizer,
    create_scheduler,
    prepare_datasets,
)  # fmt: skip
from nanovllm.training.evaluation import evaluate_model
from nanovllm.training.memory import estimate_training_memory
from nanovllm_core.contracts import IGNORE
from nanovllm_core.errors import DataError, ModelError, OptionError, RecipeError, TrainingError


def test_a_new_model_and_its_figures(docs, made):
    model, tokenizer, info = made
    assert info["parameter_count"] == sum(p.numel() for p in model.parameters())
    stats = info["vocab_stats"]
    assert info["vocab_size"] == stats["vocab_size"] == tokenizer.vocab_size == len(tokenizer) == 300
    texts = [p.read_text() for p in sorted(docs.iterdir())]
    words = [w for t in texts for w in t.split()]
    one = [w for w in words if 1 in (len(tokenizer.encode(w)), len(tokenizer.encode(f" {w}")))]
    assert stats["coverage"] == pytest.approx(len(one) / len(words))
    assert 0 < stats["coverage"] < 1
    assert stats["total_words"] == len(words)
    text, count = stats["most_common"][0]
    ids = list(itertools.chain.from_iterable(tokenizer.encode(t) for t in texts))
    assert count == max(ids.count(i) for i in set(ids))
    assert any(tokenizer.decode([i]) == text and ids.count(i) == count for i in set(ids))


@pytest.mark.parametrize("size", [None, 320])
def test_a_vocabulary_of_ones_own(docs, made, tmp_path, size):
    tokenizer = CustomTokenizer(size)
    stats = tokenizer.build_vocab_from_documents(docs)
    assert tokenizer.vocab_size == stats["vocab_size"] == (size or 512)
    text = (docs / "0.txt").read_text()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(
        text
    )
    if size:
        assert stats["coverage"] >= made[2]["vocab_stats"]["coverage"]  # of 300 ids


def test_the_call_is_that_of_transformers(made, folder, batch):
    model, theirs = made[0].eval(), AutoModelForCausalLM.from_pretrained(folder).eval()
    assert dict(theirs.named_parameters()).keys() == dict(model.named_parameters()).keys()
    with torch.no_grad():
        ours, wanted = model(**batch, return_logits=True), theirs(**batch)
    assert float(ours["loss"]) == pytest.approx(float(wanted.loss), rel=1e-5)
    assert ours.loss is ours["loss"]
    real = batch["attention_mask"].bool()
    assert torch.allclose(ours.logits[real], wanted.logits[real], atol=1e-4)
    assert not ours.logits[~real].any()
    assert model(batch["input_ids"]).loss is None
    flipped = {k: v.flip(1).clone() for k, v in batch.items()}  # padded on the left, rows read backwards
    for row, n in enumerate(batch["attention_mask"].sum(1).tolist()):
        for key in batch:
            flipped[key][row, -n:] = batch[key][row, :n]
    with torch.no_grad():
        assert torch.equal(model(**flipped)["loss"], ours["loss"])


def test_the_call_refuses_what_does_not_fit(made, batch):
    model, ids = made[0], batch["input_ids"]
    for wrong in (
        {"input_ids": ids[0]}, {"input_ids": ids.float()}, {"input_ids": ids, "labels": ids[:, 1:]},
        {"input_ids": ids, "attention_mask": torch.ones(1, 2)}, {"input_ids": ids, "attention_mask": torch.zeros_like(ids)},
        {"input_ids": torch.zeros(1, 10**5, dtype=torch.long)},
    ):  # fmt: skip
        with pytest.raises(ModelError):
            model(**wrong)


@pytest.mark.parametrize("joined", [False, True])
def test_samples_hold_every_token_and_train_it_once(docs, folder, joined):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = MultiDocumentDataset(docs, tokenizer, 32, joined, chunk_overlap=8, min_chunk_size=4)
    assert len(data.documents) == 8
    assert {d["source_file"].rpartition("/")[2] for d in data.documents[:]} == {p.name for p in docs.iterdir()}
    trained, chunks = 0, {}
    for i in range(len(data)):
        sample = data[i]
        ids, labels, told = sample["input_ids"], sample["labels"], sample["metadata"]
        assert len(ids) == len(labels) == told["token_count"] <= 32
        assert labels[0] == IGNORE
        known = labels != IGNORE
        assert torch.equal(ids[known], labels[known])
        trained += int(known.sum())
        chunks.setdefault(told["source_file"], []).append(told["chunk_index"])
    assert trained == sum(d["token_count"] - 1 for d in data.documents)
    if not joined:
        assert all(numbers == list(range(len(numbers))) for numbers in chunks.values())
        whole = data.documents[0]
        assert whole["text"] == (docs / whole["source_file"].rpartition("/")[2]).read_text()
    assert torch.equal(data[-1]["input_ids"], data[len(data) - 1]["input_ids"])
    with pytest.raises(IndexError):
        data[len(data)]


def test_a_data_set_is_read_by_processes(docs, made):
    data = MultiDocumentDataset(docs, made[1], 48)
    whole = [batch["input_ids"] for batch in DataLoader(data, 2, collate_fn=collate)]
    spawned = DataLoader(data, 2, collate_fn=collate, num_workers=1, multiprocessing_context="spawn")
    assert all(torch.equal(a["input_ids"], b) for a, b in zip(spawned, whole, strict=True))


def test_what_a_data_set_cannot_be_is_told(docs, made):
    with pytest.raises(DataError, match="chunk_overlap: got 31, allowed: 0 to 30"):
        MultiDocumentDataset(docs, made[1], 32, chunk_overlap=31)
    with pytest.raises(DataError, match="neither a file nor a folder"):
        MultiDocumentDataset(docs / "nowhere", made[1])
    with pytest.raises(ModelError, match="no vocabulary yet"):
        MultiDocumentDataset(docs, CustomTokenizer(400))
    with pytest.raises(ModelError, match="got a int as tokenizer"):
        MultiDocumentDataset(docs, 3)


def test_documents_are_on_one_side(docs, made):
    train, held = prepare_datasets(docs, made[1], 64, eval_fraction=0.3)
    sides = [{d["source_file"] for d in side.documents} for side in (train, held)]
    assert len(sides[0] | sides[1]) == 8
    assert not sides[0] & sides[1]
    assert len(held.documents) == 2
    others = {
        frozenset(d["source_file"] for d in prepare_datasets(docs, made[1], 64, eval_fraction=0.3, seed=s)[1].documents)
        for s in range(6)
    }
    assert len(others) > 1
    for share in (1, -0.1):
        with pytest.raises(DataError, match="eval_fraction: got"):
            prepare_datasets(docs, made[1], 64, eval_fraction=share)


def test_a_schedule_is_that_of_a_run(made):
    optimizer = create_optimizer(made[0], learning_rate=1e-2, weight_decay=0.1)
    assert [len(g["params"]) for g in optimizer.param_groups if g["weight_decay"] == 0] == [
        sum(p.ndim < 2 for p in made[0].parameters())
    ]
    scheduler, rates = create_scheduler(optimizer, "cosine", 2, 6), []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    wanted = [1 / 3, 2 / 3] + [0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    assert rates == pytest.approx([1e-2 * w for w in wanted])
    assert create_optimizer(made[0], beta1=0.8, beta2=0.9).param_groups[0]["betas"] == (0.8, 0.9)
    with pytest.raises(OptionError, match="got 'cosin', allowed: cosine, linear, constant, wsd"):
        create_scheduler(optimizer, "cosin")


def test_an_evaluation_does_not_depend_on_the_batches(docs, made, folder):
    model, tokenizer, _ = made
    data = MultiDocumentDataset(docs, tokenizer, 48)
    found = [evaluate_model(model, tokenizer, DataLoader(data, n, collate_fn=collate), "cpu") for n in (1, 5)]
    theirs = evaluate_model(
        AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder),
        DataLoader(data, 3, collate_fn=collate), "cpu",
    )  # fmt: skip
    for one in (*found, theirs):
        assert one.loss == pytest.approx(found[0].loss, rel=1e-5)
        assert one.perplexity == pytest.approx(math.exp(one.loss))
        assert one.tokens == sum(d["token_count"] - 1 for d in data.documents)
        size = sum(len(d["text"].encode()) for d in data.documents)
        assert one.bits_per_byte == pytest.approx(one.loss * one.tokens / math.log(2) / size, rel=0.02)
    with pytest.raises(TrainingError, match="no label"):
        evaluate_model(model, tokenizer, [])


MEASURED = """
import torch
from nanovllm.training.memory import MemoryManager

manager = MemoryManager("cpu")
with manager.memory_profiling("a tensor") as figures:
    held = torch.ones(32 << 20)
    del held
assert figures["peak"] - figures["before"] > 100e6, figures
assert manager.stats["a tensor"] is figures
assert manager.log_memory_usage("now") > 10e6
"""


def test_memory_is_measured(made):
    # In a process of its own: one that has freed much keeps it, and then a new tensor needs no more.
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["a tensor", "now"]
    estimate = estimate_training_memory(made[0], batch_size=2, sequence_length=64, device="cpu")
    assert estimate["weights"] == 4 * sum(p.numel() for p in made[0].parameters())


def test_a_trainer_trains_and_answers(docs, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = {
        "dataset_path": str(docs),
        "max_seq_length": 64,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
    }
    tuned = Trainer.from_pretrained(TrainingConfig(model_name_or_path=str(folder), output_dir="tuned", **common))
    own = Trainer.from_scratch(TrainingConfig(model_size="tiny", vocab_size=300, output_dir="own", **common))
    for trainer in (tuned, own):
        result = trainer.train()
        assert result.steps == 3
        assert math.isfinite(result.metrics["loss"])
        assert math.isfinite(result.metrics["eval_loss"])
        answer = LLM(result.output_dir).generate(["the river"], SamplingParams(max_tokens=5, temperature=0))[0]
        assert set(answer) >= {"text", "token_ids"}


SCRIPT = """
from nanovllm import Trainer, TrainingConfig

if __name__ == "__main__":
    config = TrainingConfig(
        model_size="tiny", vocab_size=300, dataset_path="docs", output_dir="own", max_seq_length=64, max_steps=2,
        learning_rate=1e-3, analyze_documents=True,
    )
    print("trained", Trainer.from_scratch(config).train().steps)
"""


def test_a_finished_run_tells_what_it_came_to(docs, folder, tmp_path):
    config = TrainingConfig(
        model_name_or_path=folder,
        dataset_path=docs,
        output_dir=tmp_path,
        max_seq_length=64,
        max_steps=2,
        learning_rate=1e-3,
    )
    first, again = (Trainer.from_pretrained(config).train() for _ in range(2))
    assert first.steps == again.steps == 2
    assert again.metrics["eval_loss"] == first.metrics["eval_loss"]


STOPPED = """
import os, signal, threading
from nanovllm import Trainer, TrainingConfig
from nanovllm_core import hookimpl
from nanovllm_core.errors import Interrupted

class Stop:
    @hookimpl
    def step_done(self, step, metrics):
        if step == 4:
            os.kill(os.getpid(), signal.{signal})

config = TrainingConfig(
    model_size="tiny", vocab_size=300, dataset_path="docs", output_dir="own", max_seq_length=64, num_train_epochs=500,
    logging_steps=1, learning_rate=1e-3, eval_fraction=0,
)
try:
    Trainer.from_scratch(config, callbacks=[Stop()]).train()
except Interrupted as e:
    print("interrupted:", e)
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_says_how_to_go_on(docs, tmp_path, number):
    (tmp_path / "docs").symlink_to(docs)
    done = subprocess.run(
        [sys.executable, "-c", STOPPED.replace("{signal}", number)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "interrupted: stopped; the same command goes on from checkpoint-" in done.stdout, done.stdout + done.stderr
    assert len(list((tmp_path / "own").glob("checkpoint-*"))) == 1


def test_a_trainer_of_several_ranks_speaks_once(docs, tmp_path):
    (tmp_path / "docs").symlink_to(docs)
    (tmp_path / "train_own.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train_own.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("documents") >= 1
    assert done.stdout.count("suggested") == 1, done.stdout
    assert done.stdout.count("trained 2") == 2, done.stdout


def test_a_trainer_names_what_is_missing(docs):
    with pytest.raises(RecipeError, match=r"missing: dataset_path .*; model_name_or_path .* or train_from_scratch"):
        Trainer.from_pretrained(TrainingConfig())
    with pytest.raises(RecipeError, match=r"says train_from_scratch; use Trainer\.from_scratch"):
        Trainer.from_pretrained(TrainingConfig(train_from_scratch=True, dataset_path=str(docs)))
    with pytest.raises(RecipeError, match=r"names the pretrained .x.; use Trainer\.from_pretrained"):
        Trainer.from_scratch(TrainingConfig(model_name_or_path="x", dataset_path=str(docs)))
