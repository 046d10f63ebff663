"""Joined operations: who does them in one, and when their parts are called one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from attrs import frozen

from nanovllm_core.assemble import load_ops
from nanovllm_core.contracts import JOINED, Accept, KernelRequest, Ops, Refuse, Verdict
from nanovllm_core.errors import AmbiguousComponent, RefusedError
from nanovllm_core.hookspecs import hookimpl
from nanovllm_core.machine import Machine
from nanovllm_core.plan_model import ModelPlan, plan_model
from nanovllm_core.recipe import Recipe
from nanovllm_core.registry import Registry
from nanovllm_core.testing.kernel_calls import answer, calls, defined, share
from nanovllm_core.testing.kernel_cases import SHAPES
from nanovllm_core.testing.reference import DEFINITIONS, reference_ops


@frozen(kw_only=True, eq=False)
class Mine:
    """All joined operations, or those of `priorities`, by their definitions."""

    priorities: ClassVar[dict[str, int]] = dict.fromkeys(JOINED, 0)

    @hookimpl
    def probe(self, request: KernelRequest) -> Verdict:
        if request.operation in self.priorities:
            return Accept(self.priorities[request.operation], "in one")
        return Refuse("not this one")

    @hookimpl
    def load(self, request: KernelRequest) -> Callable[..., Any]:
        return DEFINITIONS[request.operation]


@frozen(kw_only=True, eq=False)
class Lower(Mine):
    """Below the parts."""

    priorities: ClassVar[dict[str, int]] = dict.fromkeys(JOINED, -1)


def planned(kernels: Any, mine: type[Mine] = Mine) -> ModelPlan:
    data = {"model": {"use": "preset", "size": "tiny"}, "kernels": kernels}
    return plan_model(Recipe.from_data(data), Registry.from_environment().extended(kernels={"mine": mine}), Machine())


def test_who_offers_it_does_it() -> None:
    plan = planned("auto")
    assert set(plan.joined) == set(JOINED)
    assert {plan.kernels[name].entry.name for name in JOINED} == {"mine"}
    assert load_ops(plan, "cpu", training=True).joined["swiglu_linear"] is DEFINITIONS["swiglu_linear"]


def test_a_part_of_higher_priority_is_called_by_itself() -> None:
    assert planned("auto", Lower).joined == ()


@pytest.mark.parametrize("kernels", ["torch", {"linear": "torch", "rms_norm": "torch", "*": "auto"}])
def test_a_part_that_the_recipe_names_is_called_by_itself(kernels: Any) -> None:
    plan = planned(kernels)
    assert plan.joined == ()
    assert load_ops(plan, "cpu", training=True).joined == {}


def test_only_the_joined_operations_of_a_named_part_fall_apart() -> None:
    assert planned({"swiglu": "torch", "*": "auto"}).joined == ("norm_linear", "norm_rotary")


def test_a_recipe_may_name_a_joined_operation() -> None:
    assert planned({"norm_rotary": "mine", "*": "auto"}, Lower).joined == ("norm_rotary",)
    with pytest.raises(RefusedError, match=r"kernels.norm_rotary: torch refuses: .*operation 'norm_rotary'"):
        planned({"norm_rotary": "torch", "*": "auto"})


def test_auto_for_a_part_names_nobody() -> None:
    assert set(planned({"linear": "auto", "*": "auto"}).joined) == set(JOINED)


def test_a_tie_matters_only_where_one_of_them_would_be_used() -> None:
    registry = Registry.from_environment()
    for mine, stops in ((Lower, False), (Mine, True)):
        recipe = Recipe.from_data({"model": {"use": "preset", "size": "tiny"}})
        both = registry.extended(kernels={"mine": mine, "yours": mine})
        if stops:
            with pytest.raises(AmbiguousComponent, match="equal priority"):
                plan_model(recipe, both, Machine())
        else:
            assert plan_model(recipe, both, Machine()).joined == ()


def test_under_tensor_slices_there_is_none_and_a_named_one_is_an_error() -> None:
    data = {"model": {"use": "preset", "size": "tiny"}, "parallel": "tensor"}
    registry = Registry.from_environment().extended(kernels={"mine": Mine})
    assert plan_model(Recipe.from_data(data), registry, Machine(world_size=2)).joined == ()
    data["kernels"] = {"swiglu_linear": "mine", "*": "auto"}
    with pytest.raises(RefusedError, match=r"kernels\.swiglu_linear: it takes whole matrices"):
        plan_model(Recipe.from_data(data), registry, Machine(world_size=2))


@pytest.mark.parametrize("name", JOINED)
def test_the_parts_one_by_one_are_the_whole(name: str) -> None:
    """`Ops` without a joined kernel, differentiated, beside the definition."""
    request = KernelRequest(operation=name, device="cpu", dtype="float32", shape=SHAPES[0])
    plain: Ops = reference_ops()
    for call in calls(request, (5, 1, 9)):
        found, right = answer(getattr(plain, name), call, call.leaves), defined(name, call, call.leaves)
        for a, b in zip([*found.outputs, *found.gradients], [*right.outputs, *right.gradients], strict=True):
            assert isinstance(a, torch.Tensor)
            assert isinstance(b, torch.Tensor)
            assert share(a, b) <= 1e-6
