"""Long prompts: what they cost in time and memory, against the three baselines that a claim about them must name.

Every number is measured at the length it stands for; nothing is extrapolated. Memory is the growth of the process from a prompt of
SHORT tokens to the long one, so that weights and activations cancel out and what the sequence keeps remains.
"""

import twins
from node import table

SHORT = 1024
NEW = 17

# As small as they can be: a million tokens of exact softmax attention are 5 * 10^11 pairs for each head of each layer.
LONG = {
    "hybrid": twins.config("lsll", 64, 64, 4, 2, 1, 1, 16, 512),
    "pure lightning": twins.config("llll", 64, 64, 4, 2, 1, 1, 16, 512),
}
LENGTHS = [("hybrid", 131_072), ("pure lightning", 131_072), ("pure lightning", 1_048_576)]
MILLION = [("hybrid", 1_048_576)]
# Stated bytes: f32 keys and values of the one softmax layer, the ids and their bookkeeping, and 16 MiB for the rest of the engine.
GROWTH_MAX = {
    "hybrid": lambda tokens: tokens * (2 * 16 * 4 + 24) + (16 << 20),
    "pure lightning": lambda tokens: tokens * 24 + (16 << 20),
}

# A layer's shares of work at 128 K as in MiniMax-M1: attention by softmax costs about twice what the projections and experts do.
HYBRID = twins.config("llllllls", 512, 1408, 8, 2, 2, 1, 32, 4096)
SOFTMAX = HYBRID | dict(attn_type_list=[1] * HYBRID["num_hidden_layers"])
MIXER_MODEL = twins.PEERS


def dense_of_equal_size(twin):
    """A plain Transformer: every head has its own keys and values, one expert that every token meets, as many parameters."""
    dense = twin | dict(
        attn_type_list=[1] * twin["num_hidden_layers"],
        num_key_value_heads=twin["num_attention_heads"],
        num_local_experts=1,
        num_experts_per_tok=1,
        intermediate_size=1,
    )
    missing = twins.parameters(twin)[0] - twins.parameters(dense)[0]
    width = 1 + missing // (3 * twin["hidden_size"] * twin["num_hidden_layers"])
    return dense | dict(intermediate_size=max(64, width // 64 * 64))


def one(node, folder, tokens, dtype=None):
    """One sequence of `tokens` prompt tokens: speeds, and bytes that its length adds to the process, at its end and at its peak. Loading
    weights can take more than computing does, and then hides in the peak what the sequence adds."""
    short = node.bench(folder, SHORT, NEW, dtype=dtype)
    long = node.bench(folder, tokens, NEW, dtype=dtype)
    return dict(
        tokens=tokens,
        parameters=long["parameters"],
        prefill_tokens_per_second=long["prefill_tokens_per_second"],
        decode_tokens_per_second=long["decode_tokens_per_second"],
        peak_rss_bytes=long["peak_rss_bytes"],
        peak_growth_bytes=long["peak_rss_bytes"] - short["peak_rss_bytes"],
        growth_bytes=long["rss_bytes"] - short["rss_bytes"],
    )


def measure_long(node, tools, cases, say):
    rows = []
    for name, tokens in cases:
        folder = twins.make(node.binary, tools / "models" / f"long-{name.replace(' ', '-')}", LONG[name])
        row = one(node, folder, tokens) | dict(model=name, growth_bytes_max=GROWTH_MAX[name](tokens))
        grown, allowed = mib(row["peak_growth_bytes"]), mib(row["growth_bytes_max"])
        say(f"{name}, {tokens} tokens: {row['prefill_tokens_per_second']:.0f} tokens/s, grew by {grown}")
        if row["peak_growth_bytes"] > row["growth_bytes_max"]:
            raise SystemExit(f"error: {name} with {tokens} tokens grew by {grown}, more than the stated {allowed}")
        rows.append(row)
    return rows


def measure_baselines(node, tools, tokens, dtype, say):
    rows = []
    for name, twin in {
        "hybrid 7:1 (ours)": HYBRID,
        "(b) every layer softmax GQA": SOFTMAX,
        "(c) dense MHA Transformer, equal total parameters": dense_of_equal_size(HYBRID),
    }.items():
        folder = twins.make(node.binary, tools / "models" / f"baseline-{len(rows)}", twin)
        row = one(node, folder, tokens, dtype) | dict(model=name)
        say(f"{name}: prefill {row['prefill_tokens_per_second']:.0f}, decode {row['decode_tokens_per_second']:.0f} tokens/s")
        rows.append(row)
    peers = twins.make(node.binary, tools / "models" / "peers", MIXER_MODEL)
    mixer = node.ask("bench", peers, mixer=True, prompt_tokens=tokens, dtype=dtype)
    return dict(tokens=tokens, dtype=dtype, models=rows, mixer=mixer)


def markdown_long(rows):
    lines = [["model", "prompt", "prefill tokens/s", "decode tokens/s", "peak of the process", "growth", "stated limit"]]
    for row in rows:
        rates = [f"{row['prefill_tokens_per_second']:,.0f}", f"{row['decode_tokens_per_second']:,.0f}"]
        sizes = [mib(row[name]) for name in ("peak_rss_bytes", "peak_growth_bytes", "growth_bytes_max")]
        lines.append([row["model"], f"{row['tokens']:,}", *rates, *sizes])
    return table(lines)


def markdown_baselines(result):
    ours, tokens, mixer = result["models"][0], result["tokens"], result["mixer"]
    lines = [[f"{tokens:,} tokens", "prefill tokens/s", "decode tokens/s", "memory of the sequence", "prefill cost", "decode cost", "memory"]]
    for row in result["models"]:
        rates = [row["prefill_tokens_per_second"], row["decode_tokens_per_second"]]
        ours_of = [ours["prefill_tokens_per_second"], ours["decode_tokens_per_second"]]
        saved = ["-"] * 3
        if row is not ours:
            saved = [percent(rate / our) for rate, our in zip(rates, ours_of)]
            saved.append(percent(ours["growth_bytes"] / row["growth_bytes"]))
        lines.append([row["model"], *(f"{rate:,.0f}" for rate in rates), mib(row["growth_bytes"]), *saved])
    share = percent(mixer["lightning_us"] / mixer["softmax_us"])
    return (
        f"{table(lines)}\n\nThe last three columns: what the hybrid saves or costs against that row. (a) Mixer only, one layer of the 918 M "
        f"twin's shape at {mixer['length']:,} tokens: lightning {mixer['lightning_us']:,.0f} us, softmax {mixer['softmax_us']:,.0f} us, {share}."
    )


def percent(share):
    """What is left of a cost, as the change."""
    return f"{share - 1:+.0%}"


def mib(count):
    return f"{count / (1 << 20):,.1f} MiB"
