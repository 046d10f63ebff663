"""`CheckpointManager`: what it saves it loads back, or says before that it could not; it keeps what it was told to."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from nanovllm import LLM, SamplingParams, Trainer, TrainingConfig
from nanovllm.training import (
    MultiDocumentDataset,
    collate,
    create_model_from_scratch,
    create_optimizer,
    create_scheduler,
)
from nanovllm.training.checkpoint import CheckpointManager
from nanovllm_core import hookimpl
from nanovllm_core.errors import CheckpointError


def steps(model, optimizer, scheduler, data, numbers):
    losses = []
    for n in numbers:
        loss = model(**collate([data[n % len(data)]]))["loss"]
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("whose", ["ours", "transformers"])
def test_a_loop_goes_on_from_its_checkpoint(docs, made, folder, tmp_path, whose):
    def fresh():
        if whose == "ours":
            return create_model_from_scratch(docs, "tiny", 300)[0]
        return AutoModelForCausalLM.from_pretrained(folder)

    def parts(model):
        optimizer = create_optimizer(model, learning_rate=1e-3)
        return model, optimizer, create_scheduler(optimizer, "linear", 2, 12)

    data, manager = MultiDocumentDataset(docs, made[1], 48), CheckpointManager(tmp_path, save_total_limit=2)
    own = parts(fresh())
    first = steps(*own, data, range(4))
    assert first[-1] < first[0]
    saved = manager.save_checkpoint(
        *own, made[1], step=4, epoch=1, loss=2.5, config=TrainingConfig(seed=7), is_best=True
    )
    wanted = steps(*own, data, range(4, 8))
    other = parts(fresh())
    told = manager.load_checkpoint(*other)
    assert (told["step"], told["epoch"], told["loss"], told["path"]) == (4, 1.0, 2.5, saved)
    assert steps(*other, data, range(4, 8)) == wanted
    assert '"seed": 7' in (saved / "training_config.json").read_text()
    assert len(LLM(saved).generate(["the river"], SamplingParams(max_tokens=4, temperature=0))[0]["token_ids"]) <= 4
    for step in (8, 9, 10):
        manager.save_checkpoint(*own, made[1], step=step, loss=3.0)
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-9", "checkpoint-10"}
    assert (manager.latest.name, manager.best.name) == ("checkpoint-10", "checkpoint-4")
    assert manager.load_checkpoint(fresh(), best=True)["step"] == 4
    with pytest.raises(CheckpointError, match="no sound checkpoint"):
        CheckpointManager(tmp_path / "empty").load_checkpoint(own[0])


class Steps:
    """A callback that keeps the steps that it hears of."""

    def __init__(self):
        self.steps = []

    @hookimpl
    def step_done(self, step, metrics):
        self.steps.append(step)


def stepped(model, optimizer, docs, tokenizer):
    """The optimizer after one step."""
    model(**collate([MultiDocumentDataset(docs, tokenizer, 48)[0]]))["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("what", ["bf16", "no step yet", "frozen", "frozen and not handed over"])
def test_what_is_saved_is_loaded_back(docs, made, folder, tmp_path, what):
    def parts():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if what == "bf16" else torch.float32)
        if "frozen" in what:
            for parameter in model.model.layers[0].parameters():
                parameter.requires_grad = False
        given = model
        if "handed" in what:
            given = torch.nn.ParameterList([p for p in model.parameters() if p.requires_grad])
        return model, create_optimizer(given)

    model, optimizer = parts()
    if what != "no step yet":
        stepped(model, optimizer, docs, made[1])
    saved = CheckpointManager(tmp_path).save_checkpoint(model, optimizer, None, made[1], step=1, loss=2.0)
    other, theirs = parts()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    CheckpointManager(tmp_path).load_checkpoint(other, theirs)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name
        assert optimizer.state[one].keys() == theirs.state[two].keys(), name
        for key, value in optimizer.state[one].items():
            assert torch.equal(value, theirs.state[two][key]), (name, key)
    assert json.loads((saved / "config.json").read_text())["dtype"] == str(model.dtype).removeprefix("torch.")


def test_what_could_not_be_loaded_back_is_refused(docs, made, folder, tmp_path):
    model, tokenizer, _ = made
    manager, small = CheckpointManager(tmp_path), create_model_from_scratch(docs, "tiny", 280)[0]
    other = AutoModelForCausalLM.from_pretrained(folder)
    stochastic = stepped(other, torch.optim.SGD(other.parameters(), 0.1, momentum=0.9), docs, tokenizer)
    first = torch.optim.AdamW(list(model.parameters())[:1])
    for wrong, told in (
        ((model, create_optimizer(model), None, None), "needs the tokenizer"),
        ((small, create_optimizer(small), None, tokenizer), "the tokenizer has 300 ids and the model 280"),
        ((other, stochastic, None, tokenizer), "got SGD, whose state a checkpoint does not hold"),
        ((model, first, None, tokenizer), "the optimizer does not train"),
    ):
        with pytest.raises(CheckpointError, match=told):
            manager.save_checkpoint(*wrong, step=1)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_best_is_what_the_caller_says(made, tmp_path):
    model, tokenizer, _ = made
    manager, optimizer = CheckpointManager(tmp_path, save_total_limit=2), create_optimizer(model)
    best = []
    for step, loss, is_best in (
        (1, 2.0, True),
        (2, 3.0, True),
        (3, 2.5, False),
        (4, float("nan"), False),
        (5, 2.5, False),
    ):
        manager.save_checkpoint(model, optimizer, None, tokenizer, step=step, loss=loss, is_best=is_best)
        best.append(manager.best.name)
    assert best == ["checkpoint-1"] + 4 * ["checkpoint-2"]
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-5"}
    manager.save_checkpoint(model, optimizer, None, tokenizer, step=3)  # from an earlier one on
    assert manager.load_checkpoint(model)["path"] == manager.latest == tmp_path / "checkpoint-3"


def test_checkpoints_of_a_run_are_left_alone(docs, made, folder, tmp_path):
    model, tokenizer, _ = made
    config = TrainingConfig(
        model_name_or_path=folder, dataset_path=docs, output_dir=tmp_path / "out", max_seq_length=64, max_steps=3,
        save_steps=1, logging_steps=1, learning_rate=1e-3,
    )  # fmt: skip
    Trainer.from_pretrained(config).train()
    there = {p.name for p in (tmp_path / "out").glob("checkpoint-*")}
    manager = CheckpointManager(tmp_path / "out", save_total_limit=1)
    with pytest.raises(CheckpointError, match="checkpoint-3 is a run's"):
        manager.save_checkpoint(model, create_optimizer(model), None, tokenizer, step=3)
    for step in (1000, 1001):
        manager.save_checkpoint(model, create_optimizer(model), None, tokenizer, step=step)
    assert {p.name for p in (tmp_path / "out").glob("checkpoint-*")} == there | {"checkpoint-1001"}
    assert manager.best is None
    heard = Steps()
    assert Trainer.from_pretrained(config.changed(max_steps=5), callbacks=[heard]).train().steps == 5
    assert heard.steps == [4, 5]
