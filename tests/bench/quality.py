"""What a dtype costs in quality: perplexity of the bundled model on a text that it was not trained on."""

from pathlib import Path

from node import table

HERE = Path(__file__).parent
MODEL = HERE.parent.parent / "inference-node" / "models" / "sluice-demo"
TEXT = HERE / "held-out.txt"
DTYPES = ["f32", "bf16", "int8"]


def measure(node):
    return {dtype: node.ask("perplexity", MODEL, file=TEXT, dtype=dtype) for dtype in DTYPES}


def markdown(result):
    exact = result["f32"]["perplexity"]
    lines = [["sluice-demo, held-out text", "perplexity", "against f32"]]
    for dtype, row in result.items():
        lines.append([dtype, f"{row['perplexity']:.3f}", f"{row['perplexity'] / exact - 1:+.2%}"])
    return f"{table(lines)}\n\n{result['f32']['tokens']:,} tokens of `tests/bench/held-out.txt`, windows of {result['f32']['window']}."
