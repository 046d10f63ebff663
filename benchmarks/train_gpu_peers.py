"""What train_gpu.py measures, and its peers: `transformers.Trainer` as a user would call it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from typing import Any

from attrs import frozen

OUTLINES: Mapping[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "family": "qwen3", "vocab_size": 151_936, "hidden": 1024, "layers": 28, "heads": 16, "kv_heads": 8, "head_dim": 128,
        "intermediate": 3072, "max_positions": 4096,
    },
    "gpt2": {
        "family": "gpt2", "vocab_size": 50_257, "hidden": 768, "layers": 12, "heads": 12, "kv_heads": 12, "head_dim": 64,
        "intermediate": 3072, "max_positions": 1024,
    },
    "medium": {  # the preset, with the largest vocabulary that is chosen for documents
        "family": "qwen3", "vocab_size": 32_768, "hidden": 1024, "layers": 16, "heads": 16, "kv_heads": 8, "head_dim": 64,
        "intermediate": 3072, "max_positions": 4096,
    },
}  # fmt: skip


@frozen
class Case:
    """One measurement. variant: "", "checkpointing", "4096", "packed" or "bf16-weights"; uses: of "compile", "liger", "flash"."""

    shape: str
    side: str  # "ours" | "trainer"
    batch: int
    length: int
    variant: str = ""
    uses: tuple[str, ...] = ()
    tiny: bool = False

    @property
    def name(self) -> str:
        return f"{self.shape}/" + "-".join(filter(None, (self.side, *self.uses, self.variant)))

    @property
    def counterpart(self) -> str:
        """Ours that this is compared with."""
        return Case(self.shape, "ours", 0, 0, self.variant).name

    @property
    def outline(self) -> dict[str, Any]:
        full = OUTLINES[self.shape]
        if not self.tiny:
            return full
        kv_heads = 4 if full["kv_heads"] == full["heads"] else 2
        small = {"vocab_size": 512, "hidden": 64, "layers": 2, "heads": 4, "kv_heads": kv_heads, "head_dim": 16}
        return {**full, **small, "intermediate": 128, "max_positions": 64}


CASES = (
    Case("qwen3-0.6b", "ours", 16, 2048),
    Case("qwen3-0.6b", "ours", 16, 2048, "checkpointing"),
    Case("qwen3-0.6b", "ours", 8, 4096, "4096"),
    Case("qwen3-0.6b", "ours", 16, 2048, "packed"),
    Case("qwen3-0.6b", "ours", 16, 2048, "bf16-weights"),
    Case("qwen3-0.6b", "trainer", 8, 2048),
    Case("qwen3-0.6b", "trainer", 8, 2048, "checkpointing"),
    Case("qwen3-0.6b", "trainer", 8, 2048, uses=("compile",)),
    Case("qwen3-0.6b", "trainer", 16, 2048, uses=("liger",)),
    Case("qwen3-0.6b", "trainer", 16, 2048, uses=("liger", "flash")),
    Case("qwen3-0.6b", "trainer", 16, 2048, "checkpointing", ("liger",)),
    Case("qwen3-0.6b", "trainer", 8, 4096, "4096", ("liger",)),
    Case("qwen3-0.6b", "trainer", 16, 2048, "bf16-weights", ("liger",)),
    Case("gpt2", "ours", 32, 1024),
    Case("gpt2", "trainer", 32, 1024),
    Case("gpt2", "trainer", 32, 1024, uses=("compile",)),
    Case("medium", "ours", 16, 1024),
    Case("medium", "trainer", 16, 1024),
    Case("medium", "trainer", 16, 1024, uses=("compile",)),
    Case("medium", "trainer", 16, 1024, uses=("liger",)),
)


def config_of(case: Case) -> Any:
    from transformers import GPT2Config, Qwen3Config

    s = case.outline
    if s["family"] == "gpt2":
        return GPT2Config(
            vocab_size=s["vocab_size"], n_positions=s["max_positions"], n_embd=s["hidden"], n_layer=s["layers"],
            n_head=s["heads"], n_inner=s["intermediate"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        )  # fmt: skip
    return Qwen3Config(
        vocab_size=s["vocab_size"], hidden_size=s["hidden"], num_hidden_layers=s["layers"], num_attention_heads=s["heads"],
        num_key_value_heads=s["kv_heads"], head_dim=s["head_dim"], intermediate_size=s["intermediate"],
        max_position_embeddings=s["max_positions"], tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip


def peer(case: Case, warm: int, steps: int) -> dict[str, Any]:
    """Seconds of `steps` steps after `warm`, the mean loss of all, the parameters."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_config(
        config_of(case),
        dtype=torch.bfloat16 if case.variant == "bf16-weights" else torch.float32,
        attn_implementation="flash_attention_2" if "flash" in case.uses else "sdpa",
    )
    marks = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (warm, warm + steps):
                if gpu:
                    torch.cuda.synchronize()
                marks.append(time.perf_counter())

    ids = torch.randint(0, case.outline["vocab_size"], (case.batch * (warm + steps), case.length))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=case.batch, max_steps=warm + steps, learning_rate=1e-4, bf16=True,
            optim="adamw_torch_fused", max_grad_norm=1.0, save_strategy="no", logging_strategy="no", report_to="none",
            dataloader_num_workers=0, disable_tqdm=True, use_cpu=not gpu, torch_compile="compile" in case.uses,
            use_liger_kernel="liger" in case.uses, gradient_checkpointing=case.variant == "checkpointing",
            gradient_checkpointing_kwargs={"use_reentrant": False} if case.variant == "checkpointing" else None,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in ids]
        result = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Clock()]).train()
    if "liger" in case.uses and not any("liger" in (m.forward.__module__ or "") for m in model.modules()):
        raise RuntimeError("Liger took no part of the model")
    return {
        "seconds": marks[1] - marks[0],
        "loss": result.training_loss,
        "parameters": model.num_parameters(),
        "weights": str(next(model.parameters()).dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
    }
