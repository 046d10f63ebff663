"""The core in a tool of one's own: texts from memory, a callback of its own, no command line.

python examples/embed.py OUTPUT_DIR
"""

import sys

from attrs import frozen

from nanovllm_core import LLM, Machine, Recipe, Record, Registry, hookimpl, make_plan, run
from nanovllm_core.contracts import Accept


@frozen(kw_only=True, eq=False)
class Memory:
    texts: tuple[str, ...]

    @hookimpl
    def probe(self, source):
        return Accept(why="texts in memory")

    @hookimpl
    def read(self, source):
        return iter([Record(value=text, source=source.name, index=i) for i, text in enumerate(self.texts)])


class Watch:
    @hookimpl
    def step_done(self, step, metrics):
        print(step, round(metrics["loss"], 2))


memory = Memory(texts=tuple(f"The river runs past old mills, {n} miles to the sea." for n in range(40)))
recipe = Recipe.from_data(
    {
        "data": {"path": "memory", "readers": ["memory"], "max_seq_length": 64},
        "model": {"use": "preset", "size": "tiny"},
        "train": {"max_steps": 20, "learning_rate": 2e-3, "gradient_accumulation_steps": 1},
        "callbacks": [],
        "output_dir": sys.argv[1],
    }
)
registry = Registry.from_environment().extended(readers={"memory": memory})
folder = run(make_plan(recipe, registry, Machine.detect()), callbacks=[Watch()])
print(LLM(folder).generate(["The river"])[0]["text"])
