"""What `tests/bench/run` runs once everything is there. See `tests/bench/run --help`."""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import lengths
import peers
import quality
from node import Node, Others

INTRODUCTION = """\
# Measurements

What `tests/bench/run` printed, unchanged, on {machine}{commit}. To repeat it on an otherwise idle machine:

```sh
tests/bench/run > inference-node/docs/measurements.md
```

`tests/bench/run --help` names the parts and their options. Weights are random where nothing else is said: speed and memory do not depend
on their values. Every number is measured at the length and batch it stands for.
"""

# Part -> title, and what must be known to read the table.
TITLES = {
    "peers": ("Beside peers", """\
One random model of 918 M parameters (196 M take part in a token; hidden 1024, 16 layers 7:1 lightning to softmax, 16 experts top-2 of
width 1024, 16 heads of 64, 4 key-value heads, vocabulary 16,384), the same bf16 weights in every system. llama.cpp is built for this
processor and runs in the micro-batch that suits it best; transformers runs the bare forward pass with its cache, without `generate`
around it. The floor is what the weights and states that must be read cost at the memory's measured speed, or the multiplications at
the processor's measured peak."""),
    "gaps": ("A long prompt among streams", """\
The same twin in bf16. Sixteen sequences decode; a prompt of 32 K tokens arrives. The gaps are those between two tokens of one stream."""),
    "quality": ("What a dtype costs", """\
The bundled model is small and the text is unlike what it was trained on; what counts is the difference between the rows."""),
    "baselines": ("What lightning attention saves at length", """\
"Cheaper at 128 K" needs a baseline. (a) The mixer alone: one lightning layer against one softmax layer. (b) The whole model against the
same model with softmax GQA in every layer. (c) Against a dense Transformer with multi-head attention and as many parameters in all. The
twin of (b) and (c): hidden 512, 8 layers, 8 experts top-2 of width 1408, 2 heads of 32, 1 key-value head; at 128 K its attention and the
rest share the work about as they do in MiniMax-M1."""),
    "long": ("Long prompts", """\
Twins of 4 layers (hidden 64, one head of 16; the hybrid has one softmax layer), small because exact softmax attention over a million
tokens is 5 * 10^11 pairs a head. Growth is the process's peak memory less its peak at a prompt of 1,024 tokens; over the stated limit
the run fails."""),
    "million": ("A million tokens through softmax attention", """\
The hybrid twin of the table above."""),
}  # fmt: skip

# Share of the processor above which a table says that others took it.
OTHERS_MAX = 0.03


def machine():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    kinds = [kind for kind in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16") if kind in fields.get("flags", "").split()]
    count = sum(line.startswith("processor") for line in lines)
    return f"{fields.get('model name', platform.machine())} ({count} cores; {', '.join(kinds)})"


def commit():
    asked = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return f" at {asked.stdout.strip()}" if asked.returncode == 0 else ""


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="+", choices=list(TITLES))
    parser.add_argument("--node", type=Path, required=True)
    parser.add_argument("--tools", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--depth", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    node, say = Node(options.node, options.threads), lambda line: print(f"   {line}", file=sys.stderr, flush=True)
    measures = {
        "peers": lambda: peers.measure(node, options.tools, options.rounds, options.depth, options.new_tokens, say),
        "gaps": lambda: peers.measure_gaps(node, options.tools, options.dtype),
        "quality": lambda: quality.measure(node),
        "baselines": lambda: lengths.measure_baselines(node, options.tools, options.tokens, options.dtype, say),
        "long": lambda: lengths.measure_long(node, options.tools, lengths.LENGTHS, say),
        "million": lambda: lengths.measure_long(node, options.tools, lengths.MILLION, say),
    }
    tables = dict(
        peers=peers.markdown, gaps=peers.markdown_gaps, quality=quality.markdown, baselines=lengths.markdown_baselines,
        long=lengths.markdown_long, million=lengths.markdown_long,
    )  # fmt: skip
    results = {}
    if not options.json:
        print(INTRODUCTION.format(machine=machine(), commit=commit()), flush=True)
    for name, (title, explanation) in TITLES.items():
        if name in options.parts:
            started, others = time.monotonic(), Others()
            results[name] = measures[name]()
            taken, busy = time.monotonic() - started, others.share()
            say(f"{name}: {taken:.0f} s; other processes had {busy:.0%} of the processor")
            if not options.json:
                note = f"\n**Not an idle machine: other processes had {busy:.0%} of the processor.**\n" if busy > OTHERS_MAX else ""
                print(f"## {title}\n\n{explanation}\n\n{tables[name](results[name])}\n{note}", flush=True)
            results[f"{name}_others_share"] = busy
    if options.json:
        print(json.dumps(dict(machine=machine(), **results)))


if __name__ == "__main__":
    main()
