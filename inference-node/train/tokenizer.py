"""Trains the byte-level BPE tokenizer on the corpus: `python tokenizer.py --data DATA OUT.json`.

Digits stay single, so that numbers can be copied and added digit by digit. The bundled tokenizer came from a run over a slightly
larger corpus (see the model card); a new one needs a model trained from random weights.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<|pad|>", "<beginning_of_sentence>", "<end_of_sentence>", "<|tool|>"]
PER_FILE = 3_000_000  # characters of each file, so that no large one decides


def pieces(corpus: Path) -> Iterator[str]:
    for path in sorted(corpus.glob("*.txt")):
        text = path.read_text()[:PER_FILE]
        yield from (text[i : i + 5000] for i in range(0, len(text), 5000))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--data", type=Path, required=True)
    arguments.add_argument("--vocabulary", type=int, default=4096)
    a = arguments.parse_args()
    tokenizer = Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=a.vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(pieces(a.data / "corpus"), trainer)
    tokenizer.save(str(a.out))


if __name__ == "__main__":
    main()
