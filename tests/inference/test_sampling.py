"""Draws follow the distribution that the parameters ask for, and each row depends on itself alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from nanovllm_kernels.torch_sampling import CANDIDATES, invert, sample

from nanovllm_core.contracts import Draws
from nanovllm_core.errors import GenerationError
from nanovllm_core.inference.params import SamplingParams
from nanovllm_core.inference.sampling import draws_of, note, penalised
from nanovllm_core.inference.sequence import AHEAD, Sequence
from nanovllm_core.inference.stopping import StopTexts
from nanovllm_core.inference.uniform import philox, uniforms
from nanovllm_core.testing.reference import sample as reference_sample


def distribution(logits: list[float], p: SamplingParams) -> list[float]:
    """The definition, in float64 and plain Python: temperature, the top k, the top p of those, of these what min-p leaves."""
    top = max(logits)
    weights = [math.exp((x - top) / p.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])[: p.top_k or len(logits)]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass / total >= p.top_p:
            break
        kept.append(i)
        mass += weights[i]
    kept = [i for i in kept if weights[i] >= p.min_p]  # the likeliest has weight 1
    mass = sum(weights[i] for i in kept)
    return [weights[i] / mass if i in set(kept) else 0.0 for i in range(len(logits))]


def answer(p: SamplingParams, ids: tuple[int, ...] = ()) -> Sequence:
    return Sequence([0], p, 9999, StopTexts(None, ()), ids=list(ids))  # type: ignore[arg-type]


def drawn(logits: torch.Tensor, answers: list[Sequence]) -> list[int]:
    """A token of each row."""
    tokens = sample(logits, draws_of(answers, logits.shape[-1], "cpu")).tolist()
    for a, token in zip(answers, tokens, strict=True):
        a.ids.append(token)
    return tokens


def draws(logits: torch.Tensor, p: SamplingParams, n: int) -> list[int]:
    rows = 500
    answers = [answer(evolve(p, seed=seed)) for seed in range(rows)]
    return [t for _ in range(n // rows) for t in drawn(logits.expand(rows, -1), answers)]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 5},
        {"top_k": 5, "temperature": 2.0},
        {"top_p": 0.8},
        {"top_p": 0.9, "temperature": 1.5},
        {"top_k": 12, "top_p": 0.7},
        {"top_k": 1000, "top_p": 0.99999},
        {"top_p": 1e-9},
        {"min_p": 0.1},
        {"min_p": 0.02, "temperature": 1.6, "top_k": 30},
        {"min_p": 0.05, "top_p": 0.95, "top_k": 20},
        {"min_p": 1.0},
    ],
    ids=str,
)
def test_frequencies(options: dict) -> None:
    p = SamplingParams(**options)
    logits = 2 * torch.randn(40, generator=torch.Generator().manual_seed(1))
    n = 15_000
    counts = torch.bincount(torch.tensor(draws(logits, p, n)), minlength=40).double()
    expected = torch.tensor(distribution(logits.tolist(), p), dtype=torch.float64) * n
    assert not counts[expected == 0].any()
    likely = expected >= 5  # a chi-square needs cells that fill; the rest form one cell
    cells = [(counts[likely], expected[likely]), (counts[~likely].sum()[None], expected[~likely].sum()[None])]
    chi2 = sum(float(((c - e) ** 2 / e)[e > 0].sum()) for c, e in cells)
    freedom = int(likely.sum()) + int(cells[1][1] > 0) - 1
    if freedom:
        chance = float(torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(chi2 / 2)))
        assert chance > 1e-3, f"chi-square {chi2:.1f} with {freedom} degrees of freedom"


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        *((k, p, 0.0) for k in (None, 3, CANDIDATES, CANDIDATES + 1, 2500) for p in (0.3, 0.97, 1.0)),
        *((k, p, m) for k in (None, 2500) for p in (0.97, 1.0) for m in (0.03, 0.97)),
    ],
)
@pytest.mark.parametrize("scale", [0.01, 8.0], ids=["flat", "peaked"])
def test_a_large_vocabulary_keeps_exactly_what_the_definition_keeps(top_k, top_p, min_p, scale) -> None:
    logits = scale * torch.randn(3000, generator=torch.Generator().manual_seed(3))
    p = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    reference = distribution(logits.double().tolist(), p)
    support = {i for i, x in enumerate(reference) if x > 0}
    seen = set(draws(logits, p, 2_500))
    assert len(seen - support) <= 1  # the last kept token may fall on either side of top_p in the last bit
    if len(support) < 50:
        assert seen >= {i for i, x in enumerate(reference) if x > 1e-2}


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(None, 0.5), (1500, 0.5), (2500, 0.3), (2500, 0.9), (2999, 0.97), (1024, 0.9)]
)
def test_top_p_is_of_what_top_k_leaves(top_k, top_p) -> None:
    """Numbers spread evenly over both halves of a draw meet all that the definition keeps, as often as it says."""
    logits = 0.3 * torch.randn(3000, generator=torch.Generator().manual_seed(5))
    p = SamplingParams(top_k=top_k, top_p=top_p)
    wanted = torch.tensor(distribution(logits.double().tolist(), p))
    grid = (torch.arange(80, dtype=torch.float64) + 0.5) / 80
    u = torch.cartesian_prod(grid, grid)
    told = evolve(draws_of([answer(p)] * len(u), 3000, "cpu"), u_B2=u)
    found = torch.bincount(sample(logits.expand(len(u), -1), told), minlength=3000) / len(u)
    assert float((found[wanted == 0]).sum()) <= 2 / 80
    assert abs(int((found > 0).sum()) / int((wanted > 0).sum()) - 1) < 0.1
    assert float((found - wanted).abs().sum()) < 0.4  # of a grid this wide; half of the tokens would make it 1


def test_greedy_takes_the_first_largest() -> None:
    greedy, warm = SamplingParams(temperature=0, top_k=2, top_p=0.1), SamplingParams(top_k=1)
    logits = torch.tensor([[1.0, 3.0, 3.0], [9.0, -1.0, 2.0]])
    assert not draws_of([answer(greedy)], 3, "cpu").drawn
    assert drawn(logits, [answer(greedy), answer(greedy)]) == [1, 0]
    assert drawn(logits, [answer(greedy), answer(warm)]) == [1, 0]


def test_almost_no_temperature_is_greedy() -> None:
    logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(2)) * 50
    for temperature in (1e-45, 1e-300, 1e-6):
        p = SamplingParams(temperature=temperature, seed=1)
        assert drawn(logits, [answer(p) for _ in range(64)]) == logits.argmax(-1).tolist()


def test_a_row_does_not_depend_on_the_others() -> None:
    g = torch.Generator().manual_seed(11)
    vocabulary = 2000
    logits = torch.randn(9, vocabulary, generator=g) * torch.rand(9, 1, generator=g) * 6
    params = [
        SamplingParams(seed=1), SamplingParams(seed=1, top_p=0.9), SamplingParams(temperature=0),
        SamplingParams(seed=3, top_k=7), SamplingParams(seed=4, top_k=1500), SamplingParams(seed=5, top_p=0.99999),
        SamplingParams(seed=6, temperature=3.0), SamplingParams(seed=7, top_k=50, top_p=0.5), SamplingParams(seed=8, min_p=0.01),
    ]  # fmt: skip
    together = [answer(p) for p in params]
    batched = [drawn(logits, together) for _ in range(20)]
    for row, p in enumerate(params):
        alone = [answer(p)]
        assert [drawn(logits[row : row + 1], alone)[0] for _ in range(20)] == [step[row] for step in batched]


def test_only_rows_that_need_it_sort_the_whole_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 3 * CANDIDATES, generator=torch.Generator().manual_seed(12))
    few, many = SamplingParams(seed=1, top_k=5), SamplingParams(seed=1, top_k=2 * CANDIDATES)
    sort, sorted_shapes = torch.Tensor.sort, []

    def counted(tensor: torch.Tensor, *args, **options):
        if options.get("descending") and tensor.shape[-1] > CANDIDATES:
            sorted_shapes.append(tuple(tensor.shape))
        return sort(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "sort", counted)
    drawn(logits, [answer(p) for p in (few, many, few)])
    assert sorted_shapes == [(1, 3 * CANDIDATES)]
    sorted_shapes.clear()
    drawn(torch.zeros(3, 3 * CANDIDATES), [answer(p) for p in (few, many, few)])  # which are the first nobody told
    assert sorted_shapes == [(3, 3 * CANDIDATES)]


@pytest.mark.parametrize("vocabulary", [300, 3 * CANDIDATES])
def test_of_tokens_that_are_as_likely_filters_keep_the_first(vocabulary: int) -> None:
    """Logits of few values, as bf16 has them."""
    generator, rows = torch.Generator().manual_seed(13), 40
    logits = torch.randint(-3, 3, (rows, vocabulary), generator=generator).bfloat16()
    draws = Draws(
        temperature_B=torch.full((rows,), 0.7),
        top_k_B=torch.tensor([(3, vocabulary // 5, vocabulary - 1, vocabulary)[i % 4] for i in range(rows)]),
        top_p_B=torch.tensor([(1.0, 0.9, 0.3)[i % 3] for i in range(rows)], dtype=torch.float64),
        min_p_B=torch.tensor([(0.0, 0.1)[i // 20] for i in range(rows)]),
        u_B2=torch.rand(rows, 2, dtype=torch.float64, generator=generator), drawn=True, filtered_R=torch.arange(rows),
    )  # fmt: skip
    assert sample(logits, draws).tolist() == reference_sample(logits, draws).tolist()


def test_what_was_said_is_less_likely_by_the_penalty() -> None:
    """As transformers does it: prompt and answer count, each token once."""
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = 3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(4))
    sequences = [
        Sequence([3, 3, 7, i], SamplingParams(temperature=0, repetition_penalty=p, logprobs=1), 9, StopTexts(None, ()), ids=[9, 11])
        for i, p in enumerate((1.0, 1.4, 3.0, 0.2))
    ]  # fmt: skip
    before = logits.clone()
    wanted = []
    for row, s in enumerate(sequences):
        process = RepetitionPenaltyLogitsProcessor(s.params.repetition_penalty)
        ids = torch.tensor([[*s.prompt, *s.ids]])
        wanted.append(int(process(ids, logits[row : row + 1].clone()).argmax()))
    chosen = drawn(penalised(logits, sequences), sequences)
    note(logits, sequences, chosen)
    assert chosen == wanted
    assert torch.equal(logits, before)
    assert len({*wanted, int(logits[1].argmax())}) > 1
    told = [s.logprobs[0]["logprob"] for s in sequences]  # of the model's own distribution
    assert torch.allclose(torch.tensor(told), logits.log_softmax(-1)[range(4), wanted], atol=1e-5)


def test_random_numbers_are_philox() -> None:
    """The known answers that come with it (Random123, kat_vectors)."""
    pi = 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344
    for counter, key, words in (
        ((0,) * 4, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, 0x299F31D0A4093822, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        assert tuple(philox(np.array(counter, np.uint64)[:, None], key)[:, 0]) == words


def test_a_number_follows_from_seed_and_position_alone() -> None:
    whole = uniforms(2**63 - 1, 0, 3 * AHEAD)
    assert (whole >= 0).all()
    assert (whole < 1).all()
    assert np.unique(whole).size == whole.size
    assert np.array_equal(whole[70:75], uniforms(2**63 - 1, 70, 5))
    sequence = answer(SamplingParams(seed=2**63 - 1))
    for i in range(2 * AHEAD):
        assert np.array_equal(sequence.uniform(), whole[1 + i])
        sequence.ids.append(0)
    del sequence.ids[5:]
    assert np.array_equal(sequence.uniform(), whole[6])


def test_without_a_seed_each_answer_has_another() -> None:
    assert len({answer(SamplingParams()).seed for _ in range(8)}) == 8
    assert answer(SamplingParams(seed=7)).seed == 7


@given(
    st.lists(st.sampled_from([0.0, 0.0, 1e-12, 0.1, 0.3, 1.0]), min_size=1, max_size=8),
    st.floats(0, 1, exclude_max=True),
)
@settings(max_examples=200)
def test_a_weight_of_zero_is_never_met(weights: list[float], u: float) -> None:
    if any(weights):
        for chance in (u, 0.0, 1 - 2**-53):
            at = invert(torch.tensor([weights]), torch.tensor([[chance]], dtype=torch.float64)).item()
            assert weights[at] > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_p": 0.5}, {"top_k": 2}], ids=str)
def test_damaged_logits_give_no_token(bad: float, options: dict) -> None:
    logits = torch.tensor([[0.0, bad, 1.0], [0.0, 9.0, 1.0]])
    assert drawn(logits, [answer(SamplingParams(seed=1, **options)) for _ in "ab"])[0] == -1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": -0.1}, "temperature: got -0.1"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature": float("inf")}, "temperature: got inf"),
        ({"temperature": 10**400}, "temperature: got 1000"),
        ({"temperature": "1"}, "temperature: got '1'"),
        ({"top_k": 0}, "top_k: got 0"),
        ({"top_k": 2.0}, "top_k: got 2.0"),
        ({"top_p": 0}, "top_p: got 0"),
        ({"top_p": 1.01}, "top_p: got 1.01"),
        ({"min_p": 1.1}, "min_p: got 1.1"),
        ({"min_p": True}, "min_p: got True"),
        ({"repetition_penalty": 0}, "repetition_penalty: got 0"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty: got 1e-300"),
        ({"stop": 5}, "stop: got (5,)"),
        ({"stop_token_ids": [None]}, "stop_token_ids: got (None,)"),
        ({"n": 0}, "n: got 0"),
        ({"logprobs": -1}, "logprobs: got -1"),
        ({"logprobs": 101}, "logprobs: got 101"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids: got"),
        ({"max_tokens": 0}, "max_tokens: got 0"),
        ({"max_tokens": True}, "max_tokens: got True"),
        ({"stop": ["a", ""]}, "stop: got"),
        ({"stop": [1]}, "stop: got"),
        ({"seed": -1}, "seed: got -1"),
        ({"ignore_eos": "no"}, "ignore_eos: got 'no'"),
    ],
)
def test_parameters_out_of_range(options: dict, said: str) -> None:
    with pytest.raises(GenerationError, match="allowed: ") as caught:
        SamplingParams(**options)
    assert said in str(caught.value)


def test_one_stop_text_or_several() -> None:
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
