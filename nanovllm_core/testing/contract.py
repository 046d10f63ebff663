"""What every component must keep, of whatever kind; the classes of each kind build on it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, ClassVar, TypeVar
from unittest import SkipTest

import attrs

from nanovllm_core.contracts import Accept, Refuse, Verdict
from nanovllm_core.errors import NanoError
from nanovllm_core.hooks import bind, verify
from nanovllm_core.options import describe, options_of, public
from nanovllm_core.structure import structure

HEAVY = ("torch", "transformers", "numpy")
LOADING = """\
import importlib, json, sys
paths, module, name, heavy = json.loads(sys.argv[1])
sys.path[:] = paths
found = importlib.import_module(module)
for part in name.split("."):
    found = getattr(found, part)
print(json.dumps([m for m in heavy if m in sys.modules]))
"""
Spec = TypeVar("Spec")


class Contract:
    """The base of all contracts. A subclass gives `component`, or a `make` that makes a fresh one for each test."""

    kind: ClassVar[str]
    component: Any = None

    def make(self) -> Any:
        """The component under test."""
        assert self.component is not None, f"{type(self).__name__}: set `component` to an instance, or override `make`"
        return self.component

    def test_follows_its_spec(self) -> None:
        """Hooks have the names and arguments of hookspecs.py; instances compare by identity."""
        problem = verify(self.kind, type(self.make()))
        self.check(not problem, f"the class {problem}", "hooks follow hookspecs.py")

    def test_has_a_summary(self) -> None:
        """The docstring's first line is what `nanovllm plugins` shows."""
        summary = (type(self.make()).__doc__ or "").strip().partition("\n")[0]
        self.check(bool(summary), "the class has no docstring", "its first line says what the component is")

    def test_options_are_documented(self) -> None:
        """The docstring has a line `name: meaning` for each option."""
        bare = [option.name for option in describe(type(self.make())) if not option.doc]
        self.check(
            not bare, f"no meaning is given for {', '.join(bare)}", "the docstring has a line `name: meaning` an option"
        )

    def test_options_can_be_written_in_a_recipe(self) -> None:
        """Defaults, and the options of the component at hand, pass the check that a recipe's options must pass."""
        component = self.make()
        cls = type(component)
        if any(a.init and a.metadata.get("internal") and a.default is attrs.NOTHING for a in attrs.fields(cls)):
            raise SkipTest(f"{cls.__name__} needs an internal field, so it is never made from a recipe")
        instances = [component]
        if all(a.default is not attrs.NOTHING for a in attrs.fields(cls) if a.init):
            instances.append(cls())
        for instance in instances:
            written = _written(instance)
            try:
                made = structure(json.loads(json.dumps(written)), cls)
            except (NanoError, TypeError, ValueError) as e:
                raise AssertionError(self.told(f"options {written}", f"a recipe can give them ({e})")) from e
            again = _written(made)
            self.check(again == written, f"options {written} came back as {again}", "what is written is what is set")

    def test_loads_without_heavy_imports(self) -> None:
        """Importing the class's module imports no torch, transformers or numpy, so that listing plugins is instant."""
        cls = type(self.make())
        if cls.__module__ in (type(self).__module__, "__main__") or "<locals>" in cls.__qualname__:
            raise SkipTest(f"{cls.__name__} is defined by the test itself, not in a module that a registry loads")
        told = json.dumps([sys.path, cls.__module__, cls.__qualname__, HEAVY])
        done = subprocess.run([sys.executable, "-c", LOADING, told], capture_output=True, text=True, timeout=120)
        self.check(done.returncode == 0, f"{cls.__module__} does not import: {done.stderr[-500:]}", "it imports")
        heavy = json.loads(done.stdout.splitlines()[-1])
        self.check(
            not heavy, f"importing {cls.__module__} imports {', '.join(heavy)}", "heavy imports stand inside methods"
        )

    # ------------------------------------------------------------ for the contracts of each kind

    def bound(self, spec: type[Spec], component: Any = None) -> Spec:
        """The component's hooks, called as the core calls them."""
        component = self.make() if component is None else component
        if problem := verify(self.kind, type(component)):
            raise SkipTest(f"{type(component).__name__} {problem}")  # test_follows_its_spec fails with it
        return bind(spec, [(type(component).__name__, component)])

    def told(self, given: str, rule: str) -> str:
        """A failure's message: which component, what was given, what the contract says."""
        return f"{self.kind}: {type(self.make()).__name__}: {given}; the contract: {rule}"

    def check(self, good: bool, given: str, rule: str) -> None:
        """Fail with the whole story unless `good`. Written out because pytest rewrites no assertion of a library."""
        if not good:
            raise AssertionError(self.told(given, rule))

    def verdict(self, given: str, probe: Any, **arguments: Any) -> Verdict:
        """What a probe answers, which is a Verdict with a reason whatever it is asked."""
        try:
            answer = probe(**arguments)
        except Exception as e:  # whatever it is, the contract forbids it
            raise AssertionError(self.told(f"probe raised {type(e).__name__} ({e}) for {given}", "never raises")) from e
        self.check(
            isinstance(answer, Accept | Refuse), f"probe answered {answer!r} for {given}", "answers Accept or Refuse"
        )
        self.check(bool(answer.why), f"probe gave no reason for {given}", "an answer carries its reason (`why`)")
        verdict: Verdict = answer
        return verdict


def _written(component: Any) -> dict[str, Any]:
    """Options by the names that a recipe gives them."""
    values = public(component)
    return {a.alias or a.name: values[a.name] for a, _ in options_of(type(component))}
