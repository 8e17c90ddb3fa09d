"""Our engine beside llama.cpp and transformers: one model, one machine, one run.

Rounds go over all systems in turn, each in a fresh process, so that a machine that slows down slows them all; the medians count.
Before that, all of them must give the same logits.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import twins
from node import table

HERE = Path(__file__).parent
CASES = ["prefill", "B=1", "B=8", "B=32"]
BATCHES = [1, 8, 32]
PREFILL = 512
# llama.cpp's lightning attention is quadratic in the micro-batch, its matrices want a large one. Of 64, 128, 256 and 512 the ends were
# its best, which of them depends on the machine: the faster one counts.
LLAMA_CPP_MICROBATCHES = [64, 512]

# What issue 3 asks of bf16 against each peer's bf16, and of int8 against our bf16.
BARS = {
    "llama.cpp": dict(zip(CASES, [2.5, 1.5, 2.0, 3.0])),
    "transformers": dict(zip(CASES, [1.2, 2.5, 2.0, 2.0])),
}
BAR_INT8 = {"B=1": 1.4}
# The 99th percentile of the gaps beside a long prompt, in medians.
BAR_GAPS = 3.0


class Sluice:
    def __init__(self, node, folder, dtype):
        self.name, self.node, self.folder, self.dtype = f"Sluice {dtype}", node, folder, dtype
        self.floor = {case: [] for case in CASES}

    def measure(self, depth, new):
        run = self.node.bench(self.folder, PREFILL, 2, dtype=self.dtype)
        rates = dict(prefill=run["prefill_tokens_per_second"])
        self.floor["prefill"].append(run.get("prefill_fraction_of_floor"))
        for batch in BATCHES:
            # The first token comes with the prompt and is not timed.
            run = self.node.bench(self.folder, depth, new + 1, batch, self.dtype)
            rates[f"B={batch}"] = run["decode_tokens_per_second"]
            self.floor[f"B={batch}"].append(run.get("decode_fraction_of_floor"))
        return rates


class LlamaCpp:
    name = "llama.cpp"

    def __init__(self, tools, file, threads):
        self.file, self.threads, self.libraries = file, threads, tools / "llama-build" / "bin"
        self.source = tools / "llama-cpp-python"

    def batched_bench(self, microbatch, prompt, new, batches):
        context = max(prompt + new, max(batches) * (prompt + new))
        words = [self.libraries / "llama-batched-bench", "-m", self.file, "-t", self.threads, "-tb", self.threads,
                 "-c", context, "-b", 2048, "-ub", microbatch, "-npp", prompt, "-ntg", new,
                 "-npl", ",".join(map(str, batches)), "--output-format", "jsonl"]  # fmt: skip
        lines = run([str(word) for word in words]).splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def measure(self, depth, new):
        # Each prompt twice: the first one also warms up.
        prefills = [line for size in LLAMA_CPP_MICROBATCHES for line in self.batched_bench(size, PREFILL, 1, [1, 1])]
        rates = dict(prefill=max(line["speed_pp"] for line in prefills))
        decodes = self.batched_bench(max(LLAMA_CPP_MICROBATCHES), depth, new, BATCHES)
        return rates | {f"B={line['pl']}": line["speed_tg"] for line in decodes}

    def logits(self, ids):
        environment = dict(os.environ, LLAMA_CPP_LIB_PATH=str(self.libraries), PYTHONPATH=str(self.source))
        words = [sys.executable, HERE / "llama_cpp_logits.py", self.file, self.threads, ids]
        return json.loads(run([str(word) for word in words], environment))["logits"]


class Transformers:
    name = "transformers"

    def __init__(self, folder, threads):
        self.folder, self.threads = folder, threads

    def ask(self, *flags):
        words = [sys.executable, HERE / "run_transformers.py", "--model", self.folder, "--threads", self.threads, *flags]
        return json.loads(run([str(word) for word in words]))

    def measure(self, depth, new):
        return self.ask("--prefill", PREFILL, "--depth", depth, "--new", new, "--batch", ",".join(map(str, BATCHES)))

    def logits(self, ids):
        return self.ask("--dtype", "float32", "--logits", ids)


def run(words, environment=None):
    """What a process says on stdout."""
    ran = subprocess.run(words, capture_output=True, text=True, env=environment)
    if ran.returncode != 0:
        raise SystemExit(f"error: {' '.join(words)[:400]}\n       {ran.stderr.strip()[-2000:]}")
    return ran.stdout


def prepare(node, tools):
    folder = twins.make(node.binary, tools / "models" / "peers", twins.PEERS)
    llama_cpp = LlamaCpp(tools, twins.for_llama_cpp(folder, twins.PEERS), node.threads)
    return folder, llama_cpp, Transformers(twins.for_transformers(folder, twins.PEERS), node.threads)


def check_agreement(node, folder, llama_cpp, transformers):
    """Every system against our f32, position by position: the median distance in units of the logits' deviation, and how often the
    likeliest token is the same. The median, because random routers have near-ties, and a position where bf16 flips an expert is far off
    without being wrong. Another model, a wrong decay or a lost state puts all positions near 1."""
    import numpy

    ids = ",".join(str((index * 7919 + 13) % twins.PEERS["vocab_size"]) for index in range(100))
    logits = lambda dtype: numpy.array(node.ask("logits", folder, ids=ids, dtype=dtype)["logits"])
    exact = logits("f32")
    theirs = transformers.logits(ids)
    others = {
        "Sluice bf16": (exact, logits("bf16"), 0.05),
        "Sluice int8": (exact, logits("int8"), 0.5),
        "llama.cpp bf16": (exact, numpy.array(llama_cpp.logits(ids)), 0.05),
        "transformers f32": (exact, numpy.array(theirs["logits"]), 0.001),
        "transformers f32, cached": (exact[-5:], numpy.array(theirs["cached"]), 0.001),
    }
    agreement = {}
    for name, (expected, found, allowed) in others.items():
        error = float(numpy.median(numpy.sqrt(((found - expected) ** 2).mean(1)) / expected.std(1)))
        same = float((found.argmax(1) == expected.argmax(1)).mean())
        agreement[name] = dict(error=error, same_argmax=same)
        if not error < allowed:
            raise SystemExit(f"error: {name} computes another model: its logits differ by {error:.3f} deviations (allowed {allowed})")
    return agreement


def measure(node, tools, rounds, depth, new, say):
    folder, llama_cpp, transformers = prepare(node, tools)
    agreement = check_agreement(node, folder, llama_cpp, transformers)
    ours = [Sluice(node, folder, "bf16"), Sluice(node, folder, "int8")]
    systems = [*ours, llama_cpp, transformers]
    runs = {system.name: {case: [] for case in CASES} for system in systems}
    for index in range(rounds):
        for system in systems:
            rates = system.measure(depth, new)
            say(f"round {index + 1}/{rounds}  {system.name:14}" + "".join(f"  {case} {rates[case]:.1f}" for case in CASES))
            for case in CASES:
                runs[system.name][case].append(rates[case])
    medians = {name: {case: median(values) for case, values in cases.items()} for name, cases in runs.items()}
    return dict(
        threads=node.threads, rounds=rounds, depth=depth, new_tokens=new, prefill_tokens=PREFILL,
        agreement=agreement, runs=runs, tokens_per_second=medians,
        floor={system.name: {case: middle(system.floor[case]) for case in CASES} for system in ours},
        ratios=ratios(medians),
    )  # fmt: skip


def measure_gaps(node, tools, dtype):
    folder = twins.make(node.binary, tools / "models" / "peers", twins.PEERS)
    return node.ask("gaps", folder, streams=16, prompt_tokens=32_768, dtype=dtype)


def markdown_gaps(result):
    lines = [["gaps between tokens, ms", "median", "p99", "longest", "p99 / median"]]
    for when, name in (("alone", "alone"), ("beside", f"while {result['prompt_tokens']:,} tokens are computed")):
        gaps = result[when]
        spread = gaps["p99_ms"] / gaps["median_ms"]
        cell = f"{spread:.2f} ({'bar' if spread <= BAR_GAPS else 'OVER the bar of'} {BAR_GAPS:.0f})"
        lines.append([name, *(f"{gaps[field]:.1f}" for field in ("median_ms", "p99_ms", "max_ms")), cell])
    return f"{table(lines)}\n\nSteps of at most {result['step_tokens_max']} tokens; the prompt took {result['prompt_s']:.1f} s."


def middle(values):
    known = [value for value in values if value is not None]
    return median(known) if known else None


def ratios(medians):
    """One row a comparison: the ratio and the bar of each case."""
    bf16, int8 = medians["Sluice bf16"], medians["Sluice int8"]
    rows = {}
    for peer, bars in BARS.items():
        rows[f"Sluice bf16 / {peer}"] = {case: dict(ratio=bf16[case] / medians[peer][case], bar=bars[case]) for case in CASES}
    rows["Sluice int8 / bf16"] = {case: dict(ratio=int8[case] / bf16[case], bar=BAR_INT8.get(case)) for case in CASES}
    return rows


def markdown(result):
    header = [f"tokens/s, {result['threads']} threads", f"prefill {PREFILL}", *(f"decode {case}" for case in CASES[1:])]
    rows = [header]
    for name, rates in result["tokens_per_second"].items():
        rows.append([name if "Sluice" in name else f"{name} bf16", *(f"{rates[case]:.0f}" for case in CASES)])
    for name, cases in result["ratios"].items():
        rows.append([name, *(judged(cases[case]) for case in CASES)])
    for name, fractions in result["floor"].items():
        cells = ["-" if fractions[case] is None else f"{fractions[case]:.0%}" for case in CASES]
        rows.append([f"{name}, of the floor", *cells])
    same = [f"{name} {one['error']:.4f} ({one['same_argmax']:.0%})" for name, one in result["agreement"].items()]
    return (
        f"{table(rows)}\n\nMedians of {result['rounds']} interleaved round{'s' if result['rounds'] > 1 else ''}; decoding of {result['new_tokens']} tokens after a prompt of "
        f"{result['depth']}. One model: the logits' distance from our f32 in deviations (same likeliest token) is {', '.join(same)}."
    )


def judged(cell):
    if cell["bar"] is None:
        return f"{cell['ratio']:.2f} x"
    return f"{cell['ratio']:.2f} x ({'bar' if cell['ratio'] >= cell['bar'] else 'BELOW the bar of'} {cell['bar']})"
