"""Time of `nanovllm plugins` beside many installed distributions, beyond the start of Python itself.

    python benchmarks/plugins.py [--distributions 150] [--rounds 10] [--out benchmarks/results/NAME.json]

Lays out distributions in a temporary folder as pip does (a module with one component, its metadata and a long
description), puts it on the path, and times whole processes, alternating: `python -c pass`, `nanovllm plugins` without
them, and with them. Byte code is compiled by the first run, which is not counted. The bound is 0.3 s.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODULE = '''
from attrs import field, frozen
from nanovllm_core.contracts import Accept, Refuse
from nanovllm_core.hookspecs import hookimpl
from nanovllm_core.options import at_least


@frozen(kw_only=True, eq=False)
class Part:
    """Files of kind {number}.

    level: how hard to look
    """

    level: int = field(default=1, validator=at_least(1))
    encoding: str = "utf-8"
    names: tuple[str, ...] = ()

    @hookimpl
    def probe(self, source):
        return Accept() if source.name.endswith(".k{number}") else Refuse("another kind")

    @hookimpl
    def read(self, source):
        return iter(())
'''


def lay_out(site: Path, count: int) -> None:
    for number in range(count):
        (site / f"extra_{number}.py").write_text(MODULE.format(number=number))
        info = site / f"extra_{number}-1.0.dist-info"
        info.mkdir()
        described = "Metadata-Version: 2.1\nName: extra-{}\nVersion: 1.0\nRequires-Dist: attrs\n\n{}"
        (info / "METADATA").write_text(described.format(number, "What it does, at length.\n" * 200))
        points = f"[nanovllm.readers]\nkind{number} = extra_{number}:Part\n"
        (info / "entry_points.txt").write_text(points)
        (info / "RECORD").write_text("")


def seconds(arguments: list[str], site: Path | None = None) -> float:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")}
    env |= {"PYTHONPATH": str(site)} if site else {}
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], env=env, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--distributions", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        site = Path(made)
        lay_out(site, args.distributions)
        plugins = ["-m", "nanovllm_core.cli", "plugins"]
        seconds(plugins, site)
        rounds = [
            {"python": seconds(["-c", "pass"]), "plugins": seconds(plugins), "extra": seconds(plugins, site)}
            for _ in range(args.rounds)
        ]
    median = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "distributions": args.distributions,
        "rounds": rounds,
        "median": median,
        "beyond_python_s": median["extra"] - median["python"],
        "ratio_to_without": median["extra"] / median["plugins"],
    }
    print(
        f"{args.distributions} extra distributions: {result['beyond_python_s']:.3f} s beyond Python's start "
        f"({median['python']:.3f} s), {result['ratio_to_without']:.2f} times that without them "
        f"({median['plugins'] - median['python']:.3f} s)"
    )
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
