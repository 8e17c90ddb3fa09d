"""A model folder from trained weights: `python export.py run/model.safetensors OUT_DIR`.

Weights in bf16 under transformers' names (the embedding is also the head, decay rates are recomputed by the loader), with the
config, tokenizer, chat template and generation config beside them.
"""

import argparse
import json
import shutil
from pathlib import Path

from model import Config, MiniMax

BUNDLED = Path(__file__).parent.parent / "models/sluice-demo"
BYTES_MAX = 48 << 20


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("weights", type=Path)
    arguments.add_argument("out", type=Path)
    a = arguments.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if a.out.resolve() != BUNDLED.resolve():
            shutil.copyfile(BUNDLED / name, a.out / name)
    config = Config(vocab_size=len(json.loads((a.out / "tokenizer.json").read_text())["model"]["vocab"]))
    model = MiniMax(config)
    model.load(a.weights)
    (a.out / "config.json").write_text(config.to_json())
    # At temperature 1 so small a model rambles; clients that honour these defaults get its likelier words.
    generation = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0, do_sample=True, temperature=0.3, top_p=0.9)
    (a.out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    model.save(a.out / "model.safetensors")
    size = (a.out / "model.safetensors").stat().st_size
    assert size <= BYTES_MAX, f"model.safetensors has {size} bytes, more than the {BYTES_MAX} that the repository takes"
    print(f"wrote {a.out}: {model.parameter_counts()[0]} parameters, {size} bytes")


if __name__ == "__main__":
    main()
