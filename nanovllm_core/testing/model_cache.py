"""Generation from what a model keeps gives what reading everything again gives."""

from __future__ import annotations

from unittest import SkipTest

from nanovllm_core.testing.model_runs import ModelTests

PROMPTS, NEW = (7, 1, 12), 6  # tokens of each prompt; tokens decoded after it


class CacheTests(ModelTests):
    def test_decoding_goes_on_from_a_prefill(self) -> None:
        """Prompts of uneven lengths, read in two groups, then one token a sequence at a time."""
        self.generate(finish={})

    def test_rows_move_when_a_sequence_is_over(self) -> None:
        """The last row takes the place of the one that is over, and goes on."""
        self.generate(finish={2: 0, 4: 1})

    def generate(self, finish: dict[int, int]) -> None:
        """Decode, ending the sequence in row `finish[step]` after a step; every logit beside the full forward's."""
        from nanovllm_core.testing.modelling import Kept, draw, logits, pack

        shape, module = self.shaped(), self.filled()
        if why := shape.limits.get("cache"):
            raise SkipTest(f"generates without a cache: {why}")
        sequences = [draw(n + NEW, self.vocab_size, seed=n) for n in PROMPTS]
        whole = [logits(module, s, pack(len(s))) for s in sequences]
        rows = Kept.of(module, shape, sequences, PROMPTS)
        if shape.own_cache:
            told = f"new_cache gave {len(rows.kv)} objects for {len(module.blocks)} blocks"
            self.check(len(rows.kv) == len(module.blocks), told, "one object a block")
        for first, last in ((0, 1), (1, 3)):
            found = rows.read(first, last)
            wanted = [whole[i][PROMPTS[i] - 1] for i in range(first, last)]
            for row, (a, b) in enumerate(zip(found, wanted, strict=True), first):
                self.close(a, b, f"the prompt in row {row}, {PROMPTS[row]} tokens", "as without a cache")
        for step in range(1, NEW + 1):
            found = rows.decode()
            for row, i in enumerate(rows.active):
                given = f"sequence {i} in row {row}, {step} tokens after its prompt of {PROMPTS[i]}"
                self.close(found[row], whole[i][rows.sizes[i] - 1], given, "as reading it all again")
            if step in finish:
                rows.finish(finish[step])
