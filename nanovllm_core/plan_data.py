"""The data's part of a plan: which sources there are, who reads each, who finds the text in a record."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from attrs import frozen

from nanovllm_core.contracts import Accept, Source
from nanovllm_core.data.documents import Documents
from nanovllm_core.data.sources import Sources
from nanovllm_core.errors import DataError, RecipeError
from nanovllm_core.files import located, sibling
from nanovllm_core.hooks import bind, bound
from nanovllm_core.hookspecs import Extractors, Readers
from nanovllm_core.negotiate import Candidate, Fault, ask, choose, usable
from nanovllm_core.options import shown
from nanovllm_core.slots import Slots

MOST = 3  # broken readers that a run tells of one by one; `nanovllm explain` has all


@frozen(kw_only=True, eq=False)
class DataPlan:
    """Where documents come from and how they are read."""

    documents: Documents
    readers: tuple[Candidate, ...]
    extractors: tuple[Candidate, ...]
    taken: Mapping[str, int]  # reader's full name -> sources that it reads
    assignment: str  # sha256 over which reader takes which source
    faults: tuple[tuple[str, str], ...] = ()  # readers that are broken, and how

    @property
    def left_out(self) -> tuple[str, ...]:
        """What lies among the sources and is not read, in sentences."""
        unknown = sorted(self.documents.unknown.items())
        texts = [f"{n} files of kind {s or '(no suffix)'} are left out: no reader takes them" for s, n in unknown]
        if odd := self.documents.all.odd:
            texts.append(f"{len(odd)} entries are left out, neither file nor folder: {', '.join(odd[:3])}")
        if outputs := self.documents.all.outputs:
            texts.append(f"{len(outputs)} output folders of other runs are left out: {', '.join(outputs[:3])}")
        if texts:  # else nothing is missed for want of these
            told = [
                f"reader {name or '(no name)'}: {why}; it may be what should read them" for name, why in self.faults
            ]
            texts += told if len(told) <= MOST else [*told[:MOST], f"and {len(told) - MOST} more broken readers"]
        return tuple(texts)


class _Pick:
    """Chooses each source's reader, and remembers."""

    def __init__(self, readers: Sequence[Candidate], missing: str) -> None:
        self.missing = missing  # what to say of a source that is no file and that no reader takes
        self.readers, self.taken, self.assignment = readers, Counter[str](), hashlib.sha256()
        self.faults = {c.entry.name: c.unusable for c in readers if c.unusable and not c.misfit}
        self._relays = {id(c.component): bound(Readers, c.component) for c in readers if not c.unusable}

    def __call__(self, source: Source) -> Readers | None:
        """The reader for a source; None when every one refuses. Raises AmbiguousComponent when two tie."""
        verdicts = [(c, ask(c, lambda r: self._relays[id(r)].probe(source=source))) for c in self.readers]
        self.faults |= {c.entry.name: v.why for c, v in verdicts if isinstance(v, Fault)}
        if not any(isinstance(v, Accept) for _, v in verdicts):
            if not source.exists:
                reasons = "".join(f"\n  {c.entry.name}: {v.why}" for c, v in verdicts)
                raise DataError(f"{self.missing}{reasons}")
            return None
        known = {id(c.component): v for c, v in verdicts}
        chosen = choose(f"data.readers ({source.name})", self.readers, lambda r: known[id(r)], "auto")
        self.taken[chosen.entry.full_name] += 1
        self.assignment.update(f"{chosen.entry.full_name}\0{source.name}\n".encode("utf-8", "backslashreplace"))
        return self._relays[id(chosen.component)]


def plan_data(slots: Slots, output_dir: Path) -> DataPlan:
    """Find the sources, and a reader for each. Raises RecipeError, OptionError, ComponentError or DataError."""
    recipe = slots.recipe
    assert recipe.data.path is not None
    readers = tuple(slots.candidates("readers", recipe.data.readers)[0])
    usable("data.readers", readers, slots.place(("data", "readers")))
    extractors = tuple(slots.candidates("extractors", recipe.data.extractors)[0])
    asked = usable(
        "data.extractors", extractors, slots.place(("data", "extractors"))
    )  # in this order; the first answer wins
    relay = bind(Extractors, [(c.entry.full_name, c.component) for c in asked])
    said = f"{recipe.text.place(('data', 'path'))}: data.path: "
    try:
        path = located(recipe.base, recipe.data.path)
        exists = path.exists()
    except ValueError:  # no file can have this name; a reader may know what it means
        path, exists = Path(), False
    found = str(path.resolve()) if exists else recipe.data.path
    if exists and Path(found).is_relative_to(output_dir):
        raise RecipeError(
            f"{said}{found} lies in output_dir {output_dir}, where a run writes and moves what it finds; name another "
            "output_dir"
        )
    missing = f"{said}{shown(recipe.data.path)} is neither a file nor a folder, and no reader takes it{sibling(path)}"
    pick = _Pick(readers, missing)
    try:
        sources = Sources.find(found, exclude=output_dir)
    except DataError as e:
        raise DataError(f"{said}{e}") from e
    documents = Documents(sources, pick, lambda record: relay.extract(record=record), recipe.data.allowed_errors)
    return DataPlan(
        documents=documents,
        readers=readers,
        extractors=extractors,
        taken=pick.taken,
        assignment=pick.assignment.hexdigest(),
        faults=tuple(sorted(pick.faults.items())),
    )
