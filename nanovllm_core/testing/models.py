"""Models: the outline that is planned with, the weights that fill it, and (`model_runs.py`) what comes out."""

from __future__ import annotations

import json
from collections import Counter
from fnmatch import fnmatchcase

from nanovllm_core.contracts import OPERATIONS, Accept
from nanovllm_core.errors import NanoError
from nanovllm_core.hookspecs import Models
from nanovllm_core.options import model_refs
from nanovllm_core.registry import Registry
from nanovllm_core.testing.model_cache import CacheTests
from nanovllm_core.testing.model_gradients import GradientTests
from nanovllm_core.testing.model_runs import ForwardTests

DTYPES = ("float32", "bfloat16", "float16", "float64")
ROLES = ("column", "row", "vocab")


class ModelContract(ForwardTests, GradientTests, CacheTests):
    """A causal language model; give it small sizes, it is run some hundred times.

    vocab_size: ids of the tokenizer that it is tried with
    tolerance: difference allowed between two ways to one result, as a share of the largest logit
    learning_rate: of the 30 steps in which it must learn a line by heart
    """

    def test_probe_accepts(self) -> None:
        answer = self.verdict("this component", self.bound(Models).probe)
        self.check(isinstance(answer, Accept), f"probe answered {answer}", "a model that is ready accepts")

    def test_names_a_tokenizer(self) -> None:
        wanted = self.bound(Models).tokenizer()
        name = wanted.get("use") if hasattr(wanted, "get") else None
        self.check(isinstance(name, str), f"tokenizer answered {wanted!r}", "{'use': a component's name, ...options}")
        try:
            Registry.from_environment().find("tokenizers", str(name))
        except NanoError as e:
            raise AssertionError(self.told(f"tokenizer answered {wanted!r}", f"it is installed ({e})")) from e

    def test_shape_is_sound(self) -> None:
        s, again = self.shaped(), self.shaped()
        self.check(s == again, f"{s}, then {again}", "the shape depends on the vocabulary alone")
        self.check(s.vocab_size >= self.vocab_size, f"vocab_size {s.vocab_size}", f"room for {self.vocab_size} ids")
        sizes = {n: getattr(s, n) for n in ("layers", "hidden", "max_positions", "parameters")}
        self.check(all(v >= 1 for v in sizes.values()), f"{sizes}", "each is at least 1")
        unknown = sorted(set(s.operations) - set(OPERATIONS))
        self.check(not unknown, f"operations {unknown}", f"allowed: {', '.join(OPERATIONS)}")
        self.check(s.dtype in DTYPES, f"dtype {s.dtype!r}", f"allowed: {', '.join(DTYPES)}")
        if "attention" in s.operations:
            heads = f"{s.heads} heads, {s.kv_heads} key/value heads of {s.head_dim}"
            good = s.heads >= 1 <= s.kv_heads and s.heads % s.kv_heads == 0 and s.head_dim >= 1
            self.check(good, heads, "who calls attention has heads, shared evenly")
        if s.window is not None:
            self.check(s.window >= 1, f"window {s.window}", "a token sees itself at least")

    def test_parameters_are_as_many_as_the_shape_says(self) -> None:
        shape, module = self.shaped(), self.meta()
        held = sum(p.numel() for _, p in module.named_parameters())
        self.check(held == shape.parameters, f"{shape.parameters:,} said, {held:,} held", "tied ones count once")

    def test_is_built_on_meta(self) -> None:
        module = self.meta()
        real = [name for name, p in module.named_parameters() if not p.is_meta]
        self.check(not real, f"parameters {real[:3]} hold values", "build allocates no parameter")
        self.filled()  # raises for a buffer that is left on meta

    def test_weights_fit_their_parameters(self) -> None:
        import torch

        hooks, shape = self.bound(Models), self.shaped()
        for name, parameter in self.meta().named_parameters():
            found = hooks.weight(shape=shape, name=name, seed=1)
            told = f"{name}: got {list(found.shape)} {found.dtype} on {found.device}"
            self.check(found.shape == parameter.shape, told, f"the parameter is {list(parameter.shape)}")
            self.check(found.is_floating_point() and not found.is_meta, told, "values in floating point")
            self.check(bool(torch.isfinite(found).all()), f"{name} is not finite", "weights are finite")

    def test_weights_depend_on_seed_and_name_alone(self) -> None:
        import torch

        hooks, shape = self.bound(Models), self.shaped()
        names = [name for name, _ in self.meta().named_parameters()]
        torch.manual_seed(1)
        first = {name: hooks.weight(shape=shape, name=name, seed=1).clone() for name in names}
        torch.manual_seed(2)
        again = {name: hooks.weight(shape=shape, name=name, seed=1) for name in reversed(names)}
        changed = [name for name in names if not torch.equal(first[name], again[name])]
        self.check(not changed, f"{changed[:3]} differ in another order", "the order of calls changes no weight")
        other = {name: hooks.weight(shape=shape, name=name, seed=2) for name in names}
        moved = any(not torch.equal(first[name], other[name]) for name in names)
        from_file = bool(list(model_refs(self.make())))
        self.check(moved or from_file, "seeds 1 and 2 give the same weights", "random weights follow the seed")

    def test_tied_means_one_parameter(self) -> None:
        """A logit, after one token, depends on two rows of a tied table: the token's, put in, and its own."""
        import torch

        from nanovllm_core.testing.modelling import backward, pack

        if not self.shaped().tied:
            return
        module, token, other = self.filled(), 1, 3
        backward(module(torch.tensor([token]), pack(1))[0, other])
        rows = {n: p.grad.flatten(1).any(1).nonzero().flatten().tolist() for n, p in module.named_parameters()
                if p.grad is not None and p.ndim == 2}  # fmt: skip
        good = any(found == [token, other] for found in rows.values())
        told = f"no parameter is both embedding and output layer: the logit of {other} after {token} moves others"
        self.check(good, told, "tied means one Parameter")

    def test_blocks_are_the_layers(self) -> None:
        module, shape = self.meta(), self.shaped()
        blocks = list(module.blocks)
        self.check(
            len(blocks) == shape.layers, f"{len(blocks)} blocks, {shape.layers} layers said", "one block a layer"
        )
        inside = {id(m) for m in module.modules()}  # type: ignore[attr-defined]  # a Module is a torch module too
        self.check(all(id(b) in inside for b in blocks), "a block is no submodule", "blocks are parts of the module")

    def test_roles_are_those_of_parameters(self) -> None:
        module, shape = self.meta(), self.shaped()
        names = [name for name, _ in module.named_parameters()]
        for pattern, role in module.roles.items():
            self.check(role in ROLES, f"{pattern!r}: {role!r}", f"a role is one of {', '.join(ROLES)}")
            met = any(fnmatchcase(name, pattern) for name in names)
            self.check(
                met or (shape.tied and role == "vocab"),
                f"{pattern!r} matches none of {names[:4]}...",
                "patterns are of parameter names (that of an output layer may stay where it is tied)",
            )
        told = Counter(n for n in names for p in module.roles if fnmatchcase(n, p))
        twice = [n for n, count in told.items() if count > 1]
        self.check(not twice, f"{twice[:3]} match two patterns", "a parameter has one role")

    def test_config_is_that_of_hugging_face(self) -> None:
        config = self.bound(Models).config(shape=self.shaped())
        told = f"config gave {str(config)[:200]}"
        try:
            back = json.loads(json.dumps(config, allow_nan=False))
        except (TypeError, ValueError) as e:
            raise AssertionError(self.told(f"{told} ({e})", "config.json is JSON")) from e
        self.check(back == config, told, "what is written to config.json is what is read")
        self.check(isinstance(config.get("model_type"), str), told, "model_type names the architecture")
        names = config.get("architectures")
        good = isinstance(names, list) and bool(names) and all(isinstance(n, str) for n in names)
        self.check(good, told, "architectures lists the class")
