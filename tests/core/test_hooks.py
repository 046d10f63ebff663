"""A component that breaks its spec is told so in one sentence; a sound one is called through a typed relay."""

from typing import ClassVar

import pytest
from attrs import define, frozen

from nanovllm_core.contracts import Accept, Document, Record, Segment, Source
from nanovllm_core.errors import BrokenComponent
from nanovllm_core.hooks import bind, given, verify
from nanovllm_core.hookspecs import LEVELS, SPECS, Callbacks, Extractors, Readers, hookimpl


@frozen(kw_only=True, eq=False)
class Good:
    """Reads nothing, properly."""

    level: int = 1

    @hookimpl
    def probe(self, source):
        return Accept(priority=self.level)

    @hookimpl
    def read(self, source):
        return iter([Record(value="x", source=source.name)])


@frozen(kw_only=True, eq=False)
class Missing:
    @hookimpl
    def probe(self, source): ...


@frozen(kw_only=True, eq=False)
class Typo(Good):
    @hookimpl
    def raed(self, source): ...


@frozen(kw_only=True, eq=False)
class Unmarked(Missing):
    def read(self, source): ...


@frozen(kw_only=True, eq=False)
class KeywordOnly(Missing):
    @hookimpl
    def read(self, *, source): ...


@frozen(kw_only=True, eq=False)
class Defaulted(Missing):
    @hookimpl
    def read(self, source=None): ...


@frozen(kw_only=True, eq=False)
class OtherArgument(Missing):
    @hookimpl
    def read(self, sources): ...


@frozen(kw_only=True, eq=False)
class Generator(Missing):
    @hookimpl
    def read(self, source):
        yield 1


@frozen(kw_only=True)
class Compares(Good):
    pass


class NotAttrs:
    @hookimpl
    def probe(self, source): ...


@frozen(kw_only=True, eq=False)
class NoHooks:
    pass


@frozen(kw_only=True, eq=False)
class Newer(Good):
    nanovllm_api: ClassVar[int] = 2


@frozen(kw_only=True, eq=False)
class Older(Good):
    nanovllm_api: ClassVar[int] = 0


@frozen(kw_only=True, eq=False)
class SaysItsLevel(Good):
    nanovllm_api: ClassVar[int] = LEVELS["readers"]


@frozen(kw_only=True, eq=False)
class LevelAsAnOption(Good):
    nanovllm_api: int = 1


@pytest.mark.parametrize(
    ("cls", "kind", "says"),
    [
        (Missing, "readers", "lacks the hook 'read'"),
        (Typo, "readers", "'raed' that readers do not have; did you mean 'read'?"),
        (Unmarked, "readers", "'read' without @hookimpl"),
        (KeywordOnly, "readers", "takes 'source' in a way"),
        (Defaulted, "readers", "gives 'source' a default"),
        (OtherArgument, "readers", "takes 'sources', which its spec does not give; did you mean 'source'?"),
        (Generator, "readers", "generator function"),
        (Compares, "readers", "compares by value"),
        (NotAttrs, "readers", "not an attrs class"),
        (NoHooks, "readers", "has no hook"),
        (NoHooks, "callbacks", "has no hook"),
        (Good, "models", "'read' that models do not have"),
        (Good(), "readers", "is Good, not a class"),
        (
            Newer,
            "readers",
            "API level 2 of readers, and this nanovllm has level 1: install a newer nanovllm, or an older",
        ),
        (Older, "readers", "API level 0 of readers, and this nanovllm has level 1: install a newer version of it"),
        (LevelAsAnOption, "readers", "write `nanovllm_api: ClassVar[int] = 1`"),
    ],
)
def test_a_broken_component_is_named_with_its_fault(cls, kind, says):
    assert says in verify(kind, cls)


@pytest.mark.parametrize("cls", [Good, SaysItsLevel])
def test_a_sound_component_passes(cls):
    assert verify("readers", cls) is None


def test_every_kind_has_hooks_and_their_documentation():
    assert LEVELS.keys() == SPECS.keys()
    for kind, spec in SPECS.items():
        hooks = [m for n, m in vars(spec).items() if not n.startswith("_") and callable(m)]
        assert hooks, kind
        assert all(h.__doc__ for h in hooks), kind


def test_relays_answer_with_the_first_result_in_the_order_given():
    @frozen(kw_only=True, eq=False)
    class Says:
        text: str | None

        @hookimpl
        def extract(self, record):
            return None if self.text is None else Document(segments=(Segment(self.text),), source="s")

    order = [("a", Says(text=None)), ("b", Says(text="b")), ("c", Says(text="c"))]
    assert bind(Extractors, order).extract(record=Record(value="", source="s")).text == "b"
    assert bind(Extractors, order[:1]).extract(record=Record(value="", source="s")) is None
    source = Source(path="/x", name="x")
    assert bind(Readers, [("g", Good(level=7))]).probe(source=source).priority == 7


def test_two_equal_components_of_one_class_are_both_called():
    heard = []

    @define(eq=False, kw_only=True)
    class Hears:
        @hookimpl
        def note(self, text):
            heard.append(text)

    bind(Callbacks, [("1", Hears()), ("2", Hears())]).note(text="hi")
    assert heard == ["hi", "hi"]


def test_one_component_may_stand_in_a_list_twice_with_other_options():
    @frozen(kw_only=True, eq=False)
    class Takes:
        names: tuple[str, ...]

        @hookimpl
        def extract(self, record):
            text = record.value if record.value in self.names else None
            return None if text is None else Document(segments=(Segment(text),), source="s")

    pairs = [("d/takes", Takes(names=("a",))), ("d/takes", Takes(names=("b",))), ("d/takes", Takes(names=("c",)))]
    relay = bind(Extractors, pairs)
    assert [relay.extract(record=Record(value=v, source="s")).text for v in "abc"] == ["a", "b", "c"]
    with pytest.raises(BrokenComponent, match="d/takes: the same instance is given twice"):
        bind(Extractors, [pairs[0], pairs[0]])


class Plain:
    """What a tool writes that embeds the core: no attrs."""

    def __init__(self):
        self.heard = []

    @hookimpl
    def note(self, text):
        self.heard.append(text)


class Misspelt(Plain):
    @hookimpl
    def step_don(self, step): ...


class OfAnotherLevel(Plain):
    nanovllm_api = 7


class Equal(Plain):
    def __eq__(self, other):
        return True


def test_ready_instances_need_not_be_attrs():
    two = Plain(), Plain()
    bind(Callbacks, given("callbacks", two)).note(text="hi")
    assert [p.heard for p in two] == [["hi"], ["hi"]]
    assert "not an attrs class" in verify("callbacks", Plain)


@pytest.mark.parametrize(
    ("instance", "says"),
    [
        (Misspelt(), "Misspelt has a hook 'step_don' that callbacks do not have; did you mean 'step_done'?"),
        (Equal(), "Equal compares by value"),
        (OfAnotherLevel(), "OfAnotherLevel is written for API level 7 of callbacks"),
        (object(), "object has no hook"),
        (Plain, "Plain is a class; give an instance of it"),
    ],
)
def test_a_ready_instance_that_would_not_be_called_is_refused(instance, says):
    with pytest.raises(BrokenComponent) as caught:
        given("callbacks", [Plain(), instance])
    assert str(caught.value).startswith(f"callbacks[1] as given: {says}")
