"""Every fenced block of the user's guide, run as a user would, each in a folder prepared for it.

    python tests/guide/blocks.py [NUMBER ...] [--list] [--out FILE]      a FILE that is there keeps its other blocks

The folder has a Hugging Face cache with a small model under the names that the guide uses, small documents under the paths
it uses, and `train.py`. Names that a Python block leaves free are defined before it (`PRELUDE`); arguments and keys that it
leaves out are completed, and both are listed. Blocks with nothing to run are listed with the reason.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from place import FOLDERS, fill, prepare  # noqa: E402

GUIDE = HERE / "guide.md"
PRELUDE = {  # what a block may leave free -> (what that needs, how it is defined)
    "TrainingConfig": ((), "from nanovllm import TrainingConfig"),
    "Trainer": ((), "from nanovllm import Trainer"),
    "MultiDocumentDataset": ((), "from nanovllm.training import MultiDocumentDataset"),
    "device": ((), "device = 'cpu'"),
    "tokenizer": ((), "from transformers import AutoTokenizer\n"
                      "tokenizer = AutoTokenizer.from_pretrained('Qwen/Qwen3-0.6B')"),
    "model": ((), "from transformers import AutoModelForCausalLM\n"
                  "model = AutoModelForCausalLM.from_pretrained('Qwen/Qwen3-0.6B')"),
    "dataset": (("MultiDocumentDataset", "tokenizer"), "dataset = MultiDocumentDataset('./documents', tokenizer, 64)"),
    "dataloader": (("dataset",), "from torch.utils.data import DataLoader\nfrom nanovllm.training import collate\n"
                                 "dataloader = DataLoader(dataset, batch_size=2, collate_fn=collate)"),
    "eval_dataloader": (("dataloader",), "eval_dataloader = dataloader"),
    "optimizer": (("model",), "from nanovllm.training import create_optimizer\noptimizer = create_optimizer(model)"),
    "scheduler": (("optimizer",), "from nanovllm.training import create_scheduler\nscheduler = create_scheduler(optimizer)"),
    "config": (("TrainingConfig",), "config = TrainingConfig()"),
}  # fmt: skip
NEEDED = {"MultiDocumentDataset": {"data_path": "'./documents'", "tokenizer": "tokenizer"}}  # arguments of a call
CONFIG = {"model_name_or_path": "Qwen/Qwen3-0.6B", "dataset_path": "./documents", "max_seq_length": 512}


def blocks(page: Path = GUIDE) -> list[dict[str, Any]]:
    """Number, line, section, language and text of each block, and the configuration that its section gave before it."""
    found: list[dict[str, Any]] = []
    section, inside = "", None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if fence := re.match(r"```(\w*)", line):
            if inside is None:
                inside = {
                    "number": len(found) + 1,
                    "line": number,
                    "section": section,
                    "language": fence[1],
                    "text": "",
                }
            else:
                before = found[-1] if found and found[-1]["section"] == section else {}
                given = (
                    json.loads(before["text"])
                    if inside["language"] == "bash" and before.get("language") == "json"
                    else {}
                )
                found.append({**inside, "given": given})
                inside = None
        elif inside is not None:
            inside["text"] += line + "\n"
        elif line.startswith("#"):
            section = line.lstrip("# ")
    return found


# ---------------------------------------------------------------- what a block means


def idle(block: dict[str, Any]) -> str:
    """Why a block has nothing to run; empty where it has."""
    lines = [line for line in block["text"].splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if block["language"] == "" or any(c in block["text"] for c in "├└"):
        return "a tree of files"
    if block["language"] == "bash" and all(re.match(r"(pip install|git clone|cd )", line) for line in lines):
        return "installs packages"
    return ""


def command(block: dict[str, Any], folder: Path) -> tuple[list[str], list[str]]:
    """How to run it in `folder`, and what was completed."""
    language, source, added = block["language"], block["text"], []
    if language == "python":
        code, added = completed_python(source)
        (folder / "block.py").write_text(code)
        return [sys.executable, "block.py"], added
    if language == "bash":
        kept = "\n".join(line for line in source.splitlines() if not line.startswith("pip "))
        for name in FOLDERS:
            if f"mkdir {name}" in kept:
                shutil.rmtree(folder / name)
        if kept.count("\npython train.py") > 1:  # each trains, where the next would find the first one's result
            kept = kept.replace("\npython train.py", "\nrm -rf checkpoints; python train.py")
        flags = [line for line in kept.splitlines() if line.startswith("--")]
        for name in ("config.json", "finetune_config.json", "scratch_config.json"):
            if name in kept and f"cat > {name}" not in kept:
                scratch = {"model_name_or_path": None, "model_size": "tiny"} if name.startswith("scratch") else {}
                config = {**CONFIG, **scratch, **block["given"]}
                (folder / name).write_text(json.dumps(config))
                added.append(f"{name}: {config}")
        if flags:
            (folder / "config.json").write_text(json.dumps(CONFIG))
            kept = "set -e\n" + "\n".join(
                f"rm -rf checkpoints; python train.py --config config.json {flag}" for flag in flags
            )
            added.append("flags alone: python train.py --config config.json before each")
        return ["bash", "-e", "-c", kept], added
    if language == "jsonl" or block["text"].lstrip().startswith("[") or "content..." in block["text"]:
        (folder / "given").mkdir()
        (folder / "given" / f"data.{language}").write_text(source)
        return [sys.executable, "-m", "nanovllm_core.cli", "analyze", "given"], ["read by `nanovllm analyze`"]
    given = json.loads(source)
    own = {"model_name_or_path"} if given.get("train_from_scratch") else set()
    missing = {key: value for key, value in CONFIG.items() if key not in given and key not in own}
    (folder / "config.json").write_text(json.dumps({**missing, **given}))
    if missing:
        added.append(f"keys: {missing}")
    ranks = given.get("tensor_parallel_size", 1) * given.get("data_parallel_size", 1)
    start = [sys.executable, "train.py"]
    if ranks > 1:
        start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "train.py"]
        added.append(f"started by torchrun with {ranks} processes")
    return [*start, "--config", "config.json"], added


def expected(block: dict[str, Any]) -> list[str]:
    """What it must print, beside ending well."""
    text = block["text"]
    trains = "train.py" in text or ".train()" in text or re.search("^--", text, re.MULTILINE)
    trains = trains or (block["language"] == "json" and "_size" in text)
    return [
        *(["saved checkpoint-"] if trains else []),
        *(["suggested "] if "--analyze_documents" in text or '"analyze_documents": true' in text else []),
        *(["Perplexity: "] if "Perplexity" in text else []),
        *(["Estimated memory: "] if "Estimated memory" in text else []),
    ]


def completed_python(source: str) -> tuple[str, list[str]]:
    """The block with what it leaves free before it and the arguments that it leaves out in it."""
    tree, added = ast.parse(source), []
    for call in ast.walk(tree):
        needed = NEEDED.get(call.func.id, {}) if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else {}
        for i, (name, value) in enumerate(needed.items()):
            if len(call.args) <= i and name not in {k.arg for k in call.keywords}:
                call.keywords.append(ast.keyword(name, ast.parse(value, mode="eval").body))
                added.append(f"argument {name}")
    code = ast.unparse(tree) if added else source
    free, bound = [], set(dir(builtins))
    for node in ast.parse(code).body:
        for name in (n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)):
            inner = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            if name not in bound and name not in free and not (name in inner and isinstance(node, ast.For | ast.With)):
                free.append(name)
        for n in ast.walk(node):
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store):
                bound.add(n.id)
            elif isinstance(n, ast.alias):
                bound.add((n.asname or n.name).split(".")[0])
    before: list[str] = []

    def define(name: str) -> None:
        needs, how = PRELUDE[name]
        for other in needs:
            define(other)
        if how not in before:
            before.append(how)

    for name in free:
        define(name)
    return "\n".join([*before, code]), [*added, *(f"name {name}" for name in free)]


def run(block: dict[str, Any], cache: Path, place: Path) -> dict[str, Any]:
    """Run one block in a fresh folder."""
    told = {k: block[k] for k in ("number", "line", "section", "language")}
    if why := idle(block):
        return {**told, "outcome": "nothing to run", "reason": why}
    folder = place / str(block["number"])
    folder.mkdir()
    fill(folder)
    words, added = command(block, folder)
    bin_folder = str(Path(sys.executable).parent)
    threads = "1" if "torchrun" in str(words) else os.environ.get("OMP_NUM_THREADS", "2")
    environment = {
        **os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads,
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    began = time.perf_counter()
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    ok = done.returncode == 0 and all(word in done.stdout for word in expected(block))
    shutil.rmtree(folder, ignore_errors=ok)
    tail = "" if ok else (done.stdout[-1500:] + done.stderr[-3000:])
    return {
        **told, "outcome": "ran" if ok else "failed", "seconds": round(time.perf_counter() - began, 1),
        **({"completed": added} if added else {}), **({"output": tail} if tail else {}),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*", type=int)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    all_blocks = blocks()
    chosen = [b for b in all_blocks if not args.numbers or b["number"] in args.numbers]
    if args.list:
        for b in chosen:
            print(f"{b['number']:3} line {b['line']:4} {b['language']:7} {idle(b) or b['section']}")
        return 0
    rows = []
    with tempfile.TemporaryDirectory(prefix="guide-") as name:
        cache, place = Path(name) / "cache", Path(name) / "work"
        place.mkdir()
        prepare(cache)
        for block in chosen:
            rows.append(run(block, cache, place))
            row = rows[-1]
            print(
                f"{row['number']:3} {row['language']:7} {row['outcome']:14} {row.get('seconds', 0):6.1f} s  {row['section']}",
                flush=True,
            )
            if "output" in row:
                print(row["output"], flush=True)
    if args.out and args.out.exists():
        new = {row["number"] for row in rows}
        rows += [row for row in json.loads(args.out.read_text())["blocks"] if row["number"] not in new]
        rows.sort(key=lambda row: row["number"])
    ran, able = (sum(row["outcome"] in kinds for row in rows) for kinds in (("ran",), ("ran", "failed")))
    print(f"{ran} of {able} run; {len(rows) - able} have nothing to run; {len(rows)} in all")
    if args.out:
        told = {
            "benchmark": "guide", "date": date.today().isoformat(), "ran": ran, "able": able, "total": len(rows), "blocks": rows,
        }  # fmt: skip
        args.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return int(ran < able)


if __name__ == "__main__":
    sys.exit(main())
