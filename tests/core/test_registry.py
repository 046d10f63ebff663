"""Finding, colliding, breaking and removing components, and choosing among them."""

import sys
import textwrap

import pytest
from attrs import frozen

from nanovllm_core.contracts import Accept, Refuse
from nanovllm_core.errors import AmbiguousComponent, BrokenComponent, ComponentError, RefusedError, UnknownComponent
from nanovllm_core.hookspecs import SPECS, hookimpl
from nanovllm_core.negotiate import Candidate, choose
from nanovllm_core.registry import Entry, Registry

SOUND = """
    from attrs import frozen
    from nanovllm_core.hookspecs import hookimpl

    @frozen(kw_only=True, eq=False)
    class Part:
        '''A sound extractor.

        More about it.'''
        @hookimpl
        def extract(self, record):
            return None
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs distributions as pip lays them out: a module and its metadata on the path."""
    modules = set(sys.modules)

    def add(distribution, module_source, name, kind="extractors"):
        module = distribution.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(module_source))
        info = tmp_path / f"{module}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[nanovllm.{kind}]\n{name} = {module}:Part\n")

    monkeypatch.syspath_prepend(tmp_path)
    yield add
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def row_of(registry, full_name):
    return next(r for r in registry.rows() if f"{r.distribution}/{r.name}" == full_name)


def test_every_bundled_component_is_found_and_sound():
    rows = [r for r in Registry.from_environment().rows() if r.distribution == "nanovllm"]
    assert {r.kind for r in rows} == set(SPECS)
    assert [r for r in rows if r.state != "ok"] == []
    assert all(r.summary and r.version for r in rows)


def test_an_installed_component_has_its_distribution_version_and_summary(install):
    install("other-tools", SOUND, "special")
    row = row_of(Registry.from_environment(), "other-tools/special")
    assert (row.kind, row.version, row.state, row.summary) == ("extractors", "1.5", "ok", "A sound extractor.")


def test_a_collision_is_listed_and_the_full_name_decides(install):
    install("other-tools", SOUND, "fields")
    registry = Registry.from_environment()
    assert row_of(registry, "other-tools/fields").state == "collision"
    assert "nanovllm/fields" in row_of(registry, "other-tools/fields").summary
    assert row_of(registry, "nanovllm/fields").state == "collision"
    with pytest.raises(AmbiguousComponent, match=r"nanovllm/fields, other-tools/fields"):
        registry.find("extractors", "fields")
    assert registry.find("extractors", "other-tools/fields").version == "1.5"


def test_a_broken_component_is_a_row_and_fatal_only_when_named(install):
    install("broken-tools", "raise ValueError('no licence file')", "broken")
    registry = Registry.from_environment()
    row = row_of(registry, "broken-tools/broken")
    assert row.state == "broken"
    assert "ValueError: no licence file" in row.summary
    with pytest.raises(BrokenComponent, match=r"extractors:broken from broken-tools 1\.5: does not import"):
        registry.load(registry.find("extractors", "broken"))
    assert registry.load(registry.find("extractors", "fields"))


def test_without_removes_before_import(install):
    install("loud-tools", "raise SystemError('imported')", "loud")
    registry = Registry.from_environment(without=["extractors:loud"])
    assert "loud_tools" not in sys.modules
    with pytest.raises(UnknownComponent):
        registry.find("extractors", "loud")
    assert all(r.name != "loud" for r in registry.rows())


@pytest.mark.parametrize(
    ("given", "says"),
    [("kernel:torch", "did you mean 'kernels'"), ("kernels", "KIND:NAME"), ("kernels:torhc", "did you mean 'torch'")],
)
def test_without_explains_itself(given, says):
    with pytest.raises(ComponentError, match=says):
        Registry.from_environment(without=[given])


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(UnknownComponent, match="did you mean 'jsonl'"):
        Registry.from_environment().find("readers", "jsnol")


def test_registries_are_made_of_what_is_given_and_share_nothing():
    @frozen(kw_only=True, eq=False)
    class Mine:
        """Mine."""

        @hookimpl
        def extract(self, record):
            return None

    one, two = Registry.of(extractors={"mine": Mine}), Registry.of(extractors={"mine": Mine()})
    assert one.load(one.find("extractors", "mine")) is Mine
    assert isinstance(two.load(two.find("extractors", "mine")), Mine)
    assert Registry.of().entries == ()
    hidden = Registry.from_environment().extended(extractors={"fields": Mine})
    assert hidden.load(hidden.find("extractors", "fields")) is Mine


def candidate(name, answer):
    entry = Entry(kind="kernels", name=name, distribution=f"dist-{name}", source=None)
    return Candidate(entry=entry, component=answer)


def probe(answer):
    if isinstance(answer, Exception):
        raise answer
    return answer


def test_the_highest_priority_wins_and_every_answer_is_kept():
    asked = [
        candidate("slow", Accept(priority=1, why="works")),
        candidate("fast", Accept(priority=9, why="has the unit")),
        candidate("never", Refuse("no GPU")),
        candidate("raises", OSError("driver")),
        candidate("odd", 17),
        Candidate(entry=Entry(kind="kernels", name="bad", source=None), unusable="does not import"),
    ]
    choice = choose("kernels.attention", asked, probe, "auto")
    assert (choice.entry.name, choice.why) == ("fast", "has the unit")
    reasons = dict(choice.refused)
    assert "lower priority 1" in reasons["slow"]
    assert reasons["never"] == "no GPU"
    assert "OSError: driver" in reasons["raises"]
    assert "17" in reasons["odd"]
    assert reasons["bad"] == "does not import"


def test_a_named_component_that_refuses_is_an_error_with_its_reason():
    with pytest.raises(RefusedError, match=r"kernels\.attention: never refuses: no GPU"):
        choose("kernels.attention", [candidate("never", Refuse("no GPU"))], probe, "recipe")


def test_only_those_whose_options_fit_give_their_reasons():
    misfit = Candidate(entry=Entry(kind="models", name="new", source=None), unusable="unknown key", misfit=True)
    broken = Candidate(entry=Entry(kind="models", name="bad", source=None), unusable="does not import")
    old = candidate("old", Refuse("no config.json"))
    with pytest.raises(RefusedError) as raised:
        choose("model", [misfit, old], probe, "auto")
    assert str(raised.value) == "model: old refuses: no config.json"
    with pytest.raises(RefusedError) as raised:
        choose("model", [misfit, old, broken], probe, "auto")
    assert str(raised.value) == "model: no component accepts:\n  old: no config.json\n  bad: does not import"
    with pytest.raises(RefusedError, match=r"no component accepts:\n  new: unknown key\n  new: unknown key"):
        choose("model", [misfit, misfit], probe, "auto")


def test_equal_priorities_ask_for_a_name():
    with pytest.raises(AmbiguousComponent, match=r"dist-a/a, dist-b/b .* priority 3; name one"):
        choose("x", [candidate("a", Accept(priority=3)), candidate("b", Accept(priority=3))], probe, "auto")


def test_nobody_to_ask_is_said():
    with pytest.raises(RefusedError, match="none is installed"):
        choose("kernels.attention", [], probe, "auto")
