"""`LLM` and the components that open a folder: ours, a stranger's, and what is said when none does."""

from pathlib import Path

import pytest
from attrs import frozen
from nanovllm_models.pretrained import Pretrained

from nanovllm_core import LLM, Machine, Recipe, Registry, SamplingParams, hookimpl
from nanovllm_core.assemble import assemble, models_of, tokenizer_of
from nanovllm_core.contracts import Accept, ModelRef, Refuse
from nanovllm_core.errors import GenerationError, OptionError, RecipeError, RefusedError, UnknownComponent
from nanovllm_core.plan_model import plan_model
from nanovllm_core.training.export import export

GREEDY = SamplingParams(temperature=0, max_tokens=6)


@frozen(kw_only=True, eq=False)
class Boxed:
    """A model inside a folder of another layout, marked by `box.txt`.

    inner: the folder in it that holds the model
    """

    path: ModelRef
    inner: str = "inner"

    @property
    def model(self):
        return Pretrained(path=str(Path(self.path) / self.inner))

    @hookimpl
    def probe(self):
        return Accept(1, "a box") if (Path(self.path) / "box.txt").is_file() else Refuse(f"{self.path}: no box.txt")

    @hookimpl
    def tokenizer(self):
        return self.model.tokenizer()

    @hookimpl
    def shape(self, vocab_size):
        return self.model.shape(vocab_size)

    @hookimpl
    def build(self, shape, ops):
        return self.model.build(shape, ops)

    @hookimpl
    def weight(self, shape, name, seed):
        return self.model.weight(shape, name, seed)

    @hookimpl
    def config(self, shape):
        return self.model.config(shape)


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    """A boxed model; `box / "inner"` is a plain one."""
    folder = tmp_path_factory.mktemp("box")
    (folder / "box.txt").touch()
    data = {"model": {"use": "preset", "size": "tiny"}, "tokenizer": {"use": "bpe", "size": 300}}
    plan = plan_model(Recipe.from_data(data), Registry.from_environment(), Machine())
    tokenizer = tokenizer_of(plan, lambda: ["the river runs past old mills"])
    module = assemble(plan, "cpu", seed=1, training=False).module
    config = models_of(plan).config(shape=plan.shape)
    export(folder / "inner", module.named_parameters(), config, tokenizer, "float32")
    return folder


REGISTRY = Registry.from_environment().extended(models={"boxed": Boxed})


def test_the_component_that_knows_the_folder_opens_it(box):
    [wanted] = LLM(box / "inner").generate(["the river"], GREEDY)
    for path, model, chosen in (
        (box / "inner", "auto", "pretrained"),
        (box, "auto", "boxed"),
        (box, "boxed", "boxed"),
        (box, {"use": "boxed", "inner": "inner"}, "boxed"),
        (box, {"use": "auto", "inner": "inner"}, "boxed"),
    ):
        llm = LLM(path, model=model, registry=REGISTRY)
        assert llm.plan.model.entry.name == chosen
        assert llm.generate(["the river"], GREEDY) == [wanted]
    assert "no box.txt" in dict(LLM(box / "inner", registry=REGISTRY).plan.model.refused)["boxed"]


def test_a_folder_that_nobody_opens_gives_every_reason(box, tmp_path):
    with pytest.raises(RefusedError, match="no component accepts") as raised:
        LLM(tmp_path, registry=REGISTRY)
    assert f"boxed: {tmp_path}: no box.txt" in str(raised.value)
    assert f"pretrained: {tmp_path}: no config.json" in str(raised.value)
    with pytest.raises(RefusedError) as raised:  # `preset` takes no folder, so its word would only confuse
        LLM(tmp_path)
    assert str(raised.value).startswith(f"model: no component accepts:\n  pretrained: {tmp_path}: no config.json")
    assert "preset" not in str(raised.value)
    with pytest.raises(RefusedError, match=r"model: pretrained refuses: .*no config\.json"):
        LLM(box, model="pretrained", registry=REGISTRY)


def test_a_model_that_cannot_be_asked_is_an_error(box):
    with pytest.raises(UnknownComponent, match="did you mean 'boxed'"):
        LLM(box, model="boxd", registry=REGISTRY)
    with pytest.raises(OptionError, match="unknown key 'iner'; did you mean 'inner'"):
        LLM(box, model={"use": "boxed", "iner": "x"}, registry=REGISTRY)
    with pytest.raises(OptionError, match="unknown key 'path'"):
        LLM(box, model="preset")
    with pytest.raises(RecipeError, match="expected a component's name"):
        LLM(box, model=None)


def test_it_ends_with_a_block_and_takes_no_strange_path(small_model):
    with LLM(small_model) as llm:
        [answer] = llm.generate("the river", SamplingParams(temperature=0, max_tokens=3, stop=None))
    assert len(answer["token_ids"]) == 3
    with pytest.raises(GenerationError, match="path: got 5, allowed: a folder, or a name on the hub"):
        LLM(5)
