"""What is frozen does not move by a bit and has no state; what thaws, thaws on its step; a resume is exact."""

import pytest
import torch

from nanovllm_core.errors import CheckpointError, RecipeError
from nanovllm_core.training import checkpoint, parts
from nanovllm_core.training.freezing import NEVER, Freezing, Thaw

TOP = ("model.layers.3.*",)


def frozen(*patterns, unfreeze=(), every=None):
    return Freezing(freeze=patterns, unfreeze=unfreeze, blocks_every=every)


def test_patterns_and_moments(tiny):
    module = tiny.model().module
    names = [name for name, _ in module.named_parameters()]
    thaws = (Thaw(at=0.5, parameters=("model.layers.*",)), Thaw(at=7, parameters=("*.3.mlp.*", "*.embed_tokens.*")))
    first = frozen("model.layers.[01].*", unfreeze=thaws).trained_from(module, 20)
    assert list(first) == names
    assert first["model.embed_tokens.weight"] == 7  # tied: the output layer with it
    assert first["model.layers.0.mlp.up_proj.weight"] == 10
    assert first["model.layers.3.mlp.up_proj.weight"] == 7
    assert first["model.layers.3.self_attn.q_proj.weight"] == 10
    assert first["model.norm.weight"] == 0
    assert frozen("*_proj.*").trained_from(module, 20)["model.layers.2.self_attn.o_proj.weight"] == NEVER


def test_blocks_thaw_from_the_last_down(tiny):
    module = tiny.model().module
    first = frozen("model.layers.0.*", every=0.25).trained_from(module, 40)
    blocks = [{v for n, v in first.items() if n.startswith(f"model.layers.{i}.")} for i in range(4)]
    assert blocks == [{NEVER}, {20}, {10}, {0}]
    assert first["model.embed_tokens.weight"] == first["model.norm.weight"] == 0


@pytest.mark.parametrize(
    ("freezing", "message"),
    [
        (
            frozen("model.layer.0.*"),
            r"train\.freeze: 'model\.layer\.0\.\*' matches no parameter of the model; .*model\.",
        ),
        (frozen("model.norm.wieght"), r"did you mean 'model\.norm\.weight'\?"),
        (frozen(unfreeze=(Thaw(at=3, parameters=("lm_head.weight",)),)), r"train\.unfreeze\[0\]\.parameters: 'lm_head"),
        (frozen("*"), "nothing is left to train in the first step"),
    ],
)
def test_a_pattern_that_fits_nothing_and_a_model_with_nothing_to_train_are_refused(tiny, freezing, message):
    with pytest.raises(RecipeError, match=message):
        freezing.trained_from(tiny.model().module, 20)


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.module.named_parameters()}


def test_frozen_parameters_stay_bit_equal_without_gradient_or_state(tiny):
    trainer = tiny.trainer(
        tiny.random_documents(seed=3), freezing=frozen("model.layers.[02].*", "model.embed_tokens.*")
    )
    before, seen = weights(trainer), set()
    clip = trainer.model.clip

    def look(norm):
        seen.update(name for name, p in trainer.model.module.named_parameters() if p.grad is not None)
        return clip(norm)

    trainer.model.clip = look
    trainer.run(lambda t: None)
    kept = {name for name, value in weights(trainer).items() if torch.equal(value, before[name])}
    names = {name for name in before if name.startswith(("model.layers.0.", "model.layers.2.", "model.embed_tokens."))}
    assert kept == names
    assert seen == before.keys() - names
    state = {name for name, p in trainer.model.module.named_parameters() if p in trainer.optimizer.state}
    assert state == before.keys() - names


def test_each_thaws_on_its_step_and_says_so(tiny):
    heard = tiny.Heard()
    trainer = tiny.trainer(
        tiny.random_documents(seed=3), heard, save_steps=1, freezing=frozen(unfreeze=(Thaw(at=0.5, parameters=TOP),))
    )
    name, moved, last = "model.layers.3.mlp.up_proj.weight", [], weights(trainer)

    def look(t):
        nonlocal last
        now = weights(t)
        moved.append(not torch.equal(now[name], last[name]))
        last = now

    trainer.run(look)
    assert moved == [False] * 4 + [True] * 4
    assert len(heard.notes) == 1
    assert heard.notes[0].startswith("step 5: 11 parameters thaw: model.layers.3.")
    parameter = trainer.model.module.get_parameter(name)
    assert trainer.optimizer.state[parameter]["step"] == 4


@pytest.mark.parametrize("at", [3, 4, 5], ids=["before", "on it", "after"])
def test_a_resume_around_a_thaw_is_exact(tiny, tmp_path, at):
    documents = tiny.random_documents(seed=3)
    freezing = frozen("model.layers.0.*", unfreeze=(Thaw(at=4, parameters=TOP),))

    def save(trainer):
        if trainer.step == at:
            named = list(trainer.model.module.named_parameters())
            state = checkpoint.State(
                step=at, position=at, total_steps=8, identity="a", tokenizer="b", metrics={}, before={},
                random=[checkpoint.random_state()], progress=trainer.progress(),
            )  # fmt: skip
            checkpoint.save(tmp_path, state, parts.snapshot(named, trainer.optimizer), lambda folder: None)

    whole = tiny.trainer(documents, save_steps=1, freezing=freezing)
    whole.run(save)
    rest = go_on(tiny, tmp_path, documents, freezing)
    rest.run(lambda t: None)
    assert rest.step == 8
    a, b = weights(whole), weights(rest)
    assert all(torch.equal(a[name], b[name]) for name in a)


def go_on(tiny, folder, documents, freezing, total=8):
    from safetensors.torch import load_file

    path, state = checkpoint.newest(folder, pytest.fail)
    trainer = tiny.trainer(documents, freezing=freezing, total=total)
    trainer.model.module.load_state_dict(load_file(path / "model.safetensors"))
    parts.load_optimizer(path, trainer.optimizer, trainer.model.module.named_parameters(), trainer.trained_from)
    trainer.resume(state.progress, longer=total > 8)
    trainer.step = trainer.position = state.step
    return trainer


def test_what_has_thawed_stays_so_in_a_longer_run(tiny, tmp_path):
    documents = tiny.random_documents(seed=3, steps=16)
    freezing = frozen(unfreeze=(Thaw(at=0.5, parameters=TOP),))

    def save(trainer):
        named = list(trainer.model.module.named_parameters())
        state = checkpoint.State(
            step=6, position=6, total_steps=8, identity="a", tokenizer="b", metrics={}, before={},
            random=[checkpoint.random_state()], progress={},
        )  # fmt: skip
        if trainer.step == 6:
            checkpoint.save(tmp_path, state, parts.snapshot(named, trainer.optimizer), lambda folder: None)

    tiny.trainer(documents, freezing=freezing, save_steps=6).run(save)
    trainer = go_on(tiny, tmp_path, documents, freezing, total=16)  # half of 16 is yet to come
    before = weights(trainer)
    trainer.run(lambda t: None)
    name = "model.layers.3.mlp.up_proj.weight"
    assert not torch.equal(before[name], weights(trainer)[name])
    assert trainer.optimizer.state[trainer.model.module.get_parameter(name)]["step"] == 2 + 10


def test_state_that_only_a_frozen_parameter_may_lack(tiny, tmp_path):
    documents = tiny.random_documents(seed=3)
    trainer = tiny.trainer(documents, total=1, warmup=0, freezing=frozen(*TOP))

    def save(trainer):
        named = list(trainer.model.module.named_parameters())
        state = checkpoint.State(
            step=1, position=1, total_steps=1, identity="a", tokenizer="b", metrics={}, before={},
            random=[checkpoint.random_state()],
        )  # fmt: skip
        checkpoint.save(tmp_path, state, parts.snapshot(named, trainer.optimizer), lambda folder: None)

    trainer.run(save)
    other = tiny.trainer(documents)
    with pytest.raises(CheckpointError, match=r"has no step of model\.layers\.3\."):
        parts.load_optimizer(
            tmp_path / "checkpoint-1", other.optimizer, other.model.module.named_parameters(), other.trained_from
        )
