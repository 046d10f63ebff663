"""The loop against a plain one: transformers' model, a forward a document, torch's AdamW, the token mean by hand."""

import math

import pytest
import torch
from attrs import define, evolve, field, frozen

from nanovllm_core.assemble import assemble, models_of
from nanovllm_core.contracts import IGNORE, Batch, MicroBatch, Step
from nanovllm_core.errors import TrainingError
from nanovllm_core.machine import Machine
from nanovllm_core.plan import plan_model
from nanovllm_core.recipe import Recipe
from nanovllm_core.registry import Registry
from nanovllm_core.training.evaluate import evaluate
from nanovllm_core.training.optimizer import rate
from nanovllm_core.training.trainer import Evaluation, Settings, Trainer

VOCABULARY, STEPS, LR, DECAY, WARMUP, CLIP = 300, 8, 3e-3, 0.1, 3, 0.5


@define(eq=False)
class Heard:
    steps: dict = field(factory=dict)
    evaluations: dict = field(factory=dict)

    def step_done(self, step, metrics):
        self.steps[step] = metrics

    def evaluated(self, step, metrics):
        self.evaluations[step] = metrics


@frozen(eq=False)
class Fixed:
    """Steps of two micro-batches of documents of random lengths, some targets untrained."""

    documents: list  # a step -> a micro-batch -> (tokens, targets) of each document

    def step(self, position):
        micro = tuple(micro_batch(pairs) for pairs in self.documents[position])
        trained = sum(m.trained for m in micro)
        return Step(micro_batches=micro, trained=trained, tokens=trained, next_position=position + 1, epoch=0.0)


def micro_batch(pairs):
    lengths = tuple(len(t) for t, _ in pairs)
    targets = torch.cat([t for _, t in pairs])
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    batch = Batch(positions=torch.cat([torch.arange(n) for n in lengths]), lengths=lengths, cu_seqlens=bounds)
    trained = int((targets != IGNORE).sum())
    return MicroBatch(tokens=torch.cat([t for t, _ in pairs]), targets=targets, batch=batch, trained=trained)


def random_documents(seed):
    generator = torch.Generator().manual_seed(seed)

    def document():
        ids = torch.randint(0, VOCABULARY, (int(torch.randint(2, 40, (), generator=generator)),), generator=generator)
        targets = ids.roll(-1)
        targets[-1] = IGNORE
        targets[torch.rand(len(ids), generator=generator) < 0.2] = IGNORE
        return ids, targets

    return [[[document() for _ in range(n)] for n in (3, 5)] for _ in range(STEPS)]


@pytest.fixture(scope="module")
def plan():
    data = {"model": {"use": "preset", "size": "tiny"}, "tokenizer": {"use": "bpe", "size": VOCABULARY}}
    return plan_model(Recipe.from_data(data), Registry.from_environment(), Machine())


def settings(**changes):
    values = {
        "total_steps": STEPS, "learning_rate": LR, "weight_decay": DECAY, "betas": (0.9, 0.95), "warmup_steps": WARMUP,
        "schedule": "cosine", "clipping": CLIP, "logging_steps": 1, "eval_steps": 4, "save_steps": 3,
    }  # fmt: skip
    return Settings(**{**values, **changes})


def reference(plan, documents):
    """Losses and gradient norms of the plain loop, and its model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = models_of(plan).config(shape=plan.shape)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="eager").train()
    own = dict(assemble(plan, "cpu", seed=5, training=True).module.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(own[name])
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for i, step in enumerate(documents):
        pairs = [pair for micro in step for pair in micro]
        total = sum(torch.nn.functional.cross_entropy(model(t[None]).logits[0], y, reduction="sum") for t, y in pairs)
        loss = total / sum(int((y != IGNORE).sum()) for _, y in pairs)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        for group in optimizer.param_groups:
            group["lr"] = LR * rate("cosine", i, total=STEPS, warmup=WARMUP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, model


def test_losses_norms_and_weights_are_those_of_a_plain_loop(plan):
    documents = random_documents(seed=11)
    losses, norms, model = reference(plan, documents)
    heard, saved = Heard(), []
    trainer = Trainer(assemble(plan, "cpu", seed=5, training=True), Fixed(documents), settings(), heard, None)
    trainer.run(lambda t: saved.append(t.step))
    assert [heard.steps[s]["loss"] for s in range(1, STEPS + 1)] == pytest.approx(losses, rel=1e-5)
    assert [heard.steps[s]["gradient_norm"] for s in range(1, STEPS + 1)] == pytest.approx(norms, rel=1e-4)
    assert saved == [3, 6, 8]
    model.requires_grad_(False)
    began = dict(assemble(plan, "cpu", seed=5, training=True).module.named_parameters())
    for name, parameter in trainer.model.module.named_parameters():
        wanted = model.get_parameter(name)
        moved = float((wanted - began[name].detach()).norm())
        assert moved > 0
        assert float((parameter.detach() - wanted).norm()) <= 1e-3 * moved, (
            name
        )  # AdamW divides tiny gradients by their size


def test_evaluation_is_the_token_mean_over_everything(plan):
    documents = random_documents(seed=12)
    parts = [micro_batch(pairs) for step in documents for pairs in step]
    heard = Heard()
    evaluation = Evaluation(batches=lambda: parts, text_bytes=1234)
    trainer = Trainer(assemble(plan, "cpu", seed=5, training=True), Fixed(documents), settings(), heard, evaluation)
    trainer.evaluate()
    module = trainer.model.module
    total, count = 0.0, 0
    with torch.no_grad():
        for part in parts:
            logits = module(part.tokens, part.batch).double()
            total += float(torch.nn.functional.cross_entropy(logits, part.targets, reduction="sum"))
            count += part.trained
    figures = heard.evaluations[0]
    assert figures["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert figures["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert figures["eval_bits_per_byte"] == pytest.approx(total / math.log(2) / 1234, rel=1e-5)


@pytest.mark.parametrize("lengths", [(9, 9, 9, 9), (31, 9, 18)], ids=["uniform", "mixed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_evaluation_leaves_nothing_behind_that_training_cannot_use(plan, lengths, dtype):
    model = assemble(evolve(plan, dtype=dtype), "cpu", seed=5, training=True)
    documents = [(torch.arange(n), torch.arange(1, n + 1)) for n in lengths]
    part = micro_batch(documents)
    figures = evaluate(model, [part], text_bytes=1)
    loss = model.module(part.tokens, part.batch, targets=part.targets)
    loss.backward()
    assert loss.item() / part.trained == pytest.approx(figures["eval_loss"], rel=1e-5)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.module.parameters())


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(plan):
    trainer = Trainer(
        assemble(plan, "cpu", seed=5, training=True), Fixed(random_documents(13)), settings(), Heard(), None
    )
    with torch.no_grad():
        trainer.model.module.get_parameter("model.norm.weight")[3] = math.nan
    before = [p.detach().clone() for p in trainer.model.module.parameters()]
    with pytest.raises(TrainingError, match="step 1: the loss is nan"):
        trainer.run(lambda t: None)
    for a, b in zip(before, trainer.model.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
