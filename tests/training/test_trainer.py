"""The loop against a plain one: transformers' model, a forward a document, torch's AdamW, the token mean by hand."""

import math
import random
from itertools import accumulate, pairwise

import pytest
import torch
from attrs import evolve

from nanovllm_core.assemble import assemble, models_of
from nanovllm_core.contracts import IGNORE, Step
from nanovllm_core.training.evaluate import Evaluation, evaluate
from nanovllm_core.training.schedule import Schedule


def reference(plan, tiny, documents, total):
    """Losses and gradient norms of the plain loop, and its model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = models_of(plan).config(shape=plan.shape)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="eager").train()
    own = dict(tiny.model().module.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(own[name])
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": tiny.DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    schedule = Schedule(kind="cosine", total=total, warmup=tiny.WARMUP)
    losses, norms = [], []
    for i, step in enumerate(documents):
        pairs = [pair for micro in step for pair in micro]
        summed = sum(torch.nn.functional.cross_entropy(model(t[None]).logits[0], y, reduction="sum") for t, y in pairs)
        loss = summed / sum(int((y != IGNORE).sum()) for _, y in pairs)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), tiny.CLIP)))
        for group in optimizer.param_groups:
            group["lr"] = tiny.LR * schedule.share(i)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, model


def test_losses_norms_and_weights_are_those_of_a_plain_loop(plan, tiny):
    """The short form of benchmarks/numerics.py, which takes 200 steps."""
    total = 20
    documents = tiny.random_documents(seed=11, steps=total)
    losses, norms, model = reference(plan, tiny, documents, total)
    heard, saved = tiny.Heard(), []
    trainer = tiny.trainer(documents, heard, total=total, save_steps=6)
    trainer.run(lambda t: saved.append(t.step))
    assert [heard.steps[s]["loss"] for s in range(1, total + 1)] == pytest.approx(losses, rel=1e-5)
    assert [heard.steps[s]["gradient_norm"] for s in range(1, total + 1)] == pytest.approx(norms, rel=1e-3)
    assert saved == [6, 12, 18, 20]
    model.requires_grad_(False)
    began = dict(tiny.model().module.named_parameters())
    for name, parameter in trainer.model.module.named_parameters():
        wanted = model.get_parameter(name)
        moved = float((wanted - began[name].detach()).norm())
        assert moved > 0
        # AdamW divides tiny gradients by their size
        assert float((parameter.detach() - wanted).norm()) <= 1e-2 * moved, name


def splits(number, documents=12):
    """That many different ways to cut so many documents into micro-batches."""
    draw = random.Random(3)
    found = {(documents,), (1,) * documents}
    while len(found) < number:
        cuts = sorted(draw.sample(range(1, documents), draw.randint(1, 8)))
        found.add(tuple(b - a for a, b in pairwise([0, *cuts, documents])))
    return sorted(found)


def test_loss_and_gradients_are_the_same_however_a_step_is_split(tiny):
    """Variable lengths and untrained targets: the mean of means would be off by per cents."""
    documents = tiny.random_documents(seed=14, steps=1, micro_batches=(12,))[0][0]
    model, found = tiny.model(), []
    clip = model.clip

    def look(max_norm):
        found.append({name: p.grad.clone() for name, p in model.module.named_parameters()})
        return clip(max_norm)

    model.clip = look
    losses = []
    for split in splits(24):
        at = [0, *accumulate(split)]
        parts, heard = [documents[a:b] for a, b in pairwise(at)], tiny.Heard()
        trainer = tiny.trainer([parts], heard, model=model, total=1, warmup=0, clipping=0.0)
        trainer.optimizer.update = lambda divisor, skip, seed: None  # every split begins from the same weights
        trainer.run(lambda t: None)
        losses.append(heard.steps[1]["loss"])
    assert losses == pytest.approx([losses[-1]] * 24, rel=1e-6)
    for gradients in found[:-1]:
        for name, whole in found[-1].items():  # all documents in one micro-batch
            assert float((gradients[name] - whole).norm()) <= 1e-6 * float(whole.norm()), name


def test_evaluation_is_the_token_mean_over_everything_and_each_source(tiny):
    parts = [tiny.micro_batch(pairs) for step in tiny.random_documents(seed=12) for pairs in step]
    table = [tiny.Row("a.txt", 1000), tiny.Row("b.txt", 234), tiny.Row("empty.txt", 0)]
    rows = [i % 3 // 2 for i in range(len(parts))]  # a, a, b, ...
    heard = tiny.Heard()
    held = Evaluation(batches=lambda rank, size: zip(rows, parts, strict=True), table=table)
    trainer = tiny.trainer(tiny.random_documents(seed=12), heard, held)
    trainer.evaluate()
    module = trainer.model.module
    sums = {0: [0.0, 0], 1: [0.0, 0]}
    with torch.no_grad():
        for row, part in zip(rows, parts, strict=True):
            logits = module(part.tokens, part.batch).double()
            sums[row][0] += float(torch.nn.functional.cross_entropy(logits, part.targets, reduction="sum"))
            sums[row][1] += part.trained
    total, count = sums[0][0] + sums[1][0], sums[0][1] + sums[1][1]
    figures = heard.evaluations[0]
    assert figures["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert figures["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert figures["eval_bits_per_byte"] == pytest.approx(total / math.log(2) / 1234, rel=1e-5)
    assert [(r["source"], r["tokens"]) for r in heard.tables[0]] == [("a.txt", sums[0][1]), ("b.txt", sums[1][1])]
    for row, size, (loss, tokens) in zip(heard.tables[0], (1000, 234), sums.values(), strict=True):
        assert row["loss"] == pytest.approx(loss / tokens, rel=1e-5)
        assert row["bits_per_byte"] == pytest.approx(loss / math.log(2) / size, rel=1e-5)


@pytest.mark.parametrize("lengths", [(9, 9, 9, 9), (31, 9, 18)], ids=["uniform", "mixed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_evaluation_leaves_nothing_behind_that_training_cannot_use(plan, tiny, lengths, dtype):
    model = assemble(evolve(plan, dtype=dtype), "cpu", seed=5, training=True)
    part = tiny.micro_batch([(torch.arange(n), torch.arange(1, n + 1)) for n in lengths])
    figures, _ = evaluate(model, tiny.evaluation([part]))
    loss = model.module(part.tokens, part.batch, targets=part.targets)
    loss.backward()
    assert loss.item() / part.trained == pytest.approx(figures["eval_loss"], rel=1e-5)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.module.parameters())


def test_steps_know_their_part_of_the_whole(tiny):
    """The sum over ranks is divided by what all ranks train, also where this rank trains little of it."""
    parts = tiny.random_documents(seed=15, steps=1)[0]

    class Half(tiny.Fixed):
        def step(self, position):
            step = super().step(position)
            return Step(
                micro_batches=step.micro_batches, trained=2 * step.trained, tokens=0, next_position=1, epoch=0.0
            )

    losses = []
    for steps in (tiny.Fixed([parts]), Half([parts])):
        heard = tiny.Heard()
        trainer = tiny.trainer([parts], heard, total=1, warmup=0)
        trainer.steps = steps
        trainer.run(lambda t: None)
        losses.append(heard.steps[1]["loss"])
    assert losses[1] == pytest.approx(losses[0] / 2, rel=1e-6)


class Noted:
    """Steps, and the positions that were asked for."""

    def __init__(self, steps, positions):
        self.steps, self.positions = steps, positions

    def step(self, position):
        self.positions.append(position)
        return self.steps.step(position)


def test_reading_the_next_step_ahead_changes_nothing(tiny):
    """As on a GPU: each step is read once, in order, and none beyond the last."""
    documents, ends = tiny.random_documents(seed=13), []
    for ahead in (False, True):
        heard, positions = tiny.Heard(), []
        trainer = tiny.trainer(documents, heard)
        trainer.steps, trainer.reads_ahead = Noted(trainer.steps, positions), ahead
        trainer.run(lambda t: None)
        ends.append(
            (
                positions,
                [m["loss"] for m in heard.steps.values()],
                [p.detach() for p in trainer.model.module.parameters()],
            )
        )
    plain, ahead = ends
    assert plain[:2] == ahead[:2]
    assert len(plain[0]) == tiny.STEPS
    assert all(torch.equal(a, b) for a, b in zip(plain[2], ahead[2], strict=True))


def test_a_step_is_whole_when_the_one_read_ahead_of_it_cannot_be_read(tiny):
    """It is told of and saved; the error comes when the next begins. Nobody waits for a rank that reads."""
    saved, heard, doings = [], tiny.Heard(), []
    trainer = tiny.trainer(tiny.random_documents(seed=13), heard, save_steps=3)
    trainer.steps, trainer.reads_ahead = Broken(trainer.steps, doings), True
    trainer.at = lambda doing, alone=False: doings.append((doing, alone))
    with pytest.raises(OSError, match="the disk"):
        trainer.run(lambda t: saved.append(t.step))
    assert (saved, trainer.step, sorted(heard.steps)) == ([3], 3, [1, 2, 3])
    reads = [i for i, doing in enumerate(doings) if doing == "read"]
    assert all(doings[i - 1][1] for i in reads[1:])


class Broken:
    """Steps of which the fourth cannot be read."""

    def __init__(self, steps, doings):
        self.steps, self.doings = steps, doings

    def step(self, position):
        self.doings.append("read")
        if position == 3 * self.steps.step(0).next_position:
            raise OSError("the disk")
        return self.steps.step(position)


def test_a_step_read_for_another_position_is_not_taken(tiny):
    documents, losses = tiny.random_documents(seed=13), []
    for wrong in (False, True):
        heard = tiny.Heard()
        trainer = tiny.trainer(documents, heard)
        if wrong:
            trainer.ahead = (5, trainer.steps.step(5))
        trainer.run(lambda t: None)
        losses.append([metrics["loss"] for metrics in heard.steps.values()])
    assert losses[0] == losses[1]


def test_gradients_below_the_limit_are_left_as_they_are(tiny):
    """As without a limit, bit for bit."""
    documents, ends = tiny.random_documents(seed=13), []
    for clipping in (0.0, 1e9):
        trainer = tiny.trainer(documents, clipping=clipping)
        trainer.run(lambda t: None)
        ends.append([p.detach() for p in trainer.model.module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
