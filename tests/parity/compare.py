"""Compares `sluice-node logits` with the expectation of every case in a folder; exits 1 if one differs.

    compare.py BINARY FOLDER
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ALLOWED = 2e-3  # of the standard deviation of the logits


def compare(binary, case):
    expected = load_file(case / "expected.safetensors")
    ids = ",".join(map(str, expected["ids"].tolist()))
    command = [binary, "logits", "--model", str(case), "--ids", ids, "--dtype", "f32", "--json"]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found, wanted = torch.tensor(json.loads(answer)["logits"]), expected["logits"]
    difference = ((found - wanted).abs().max() / wanted.std()).item()
    same = bool((found.argmax(-1) == wanted.argmax(-1)).all())
    verdict = same and difference < ALLOWED
    print(f"{case.name:16} {len(wanted):4} tokens  difference {difference:.1e}  argmax {'equal' if same else 'DIFFERS'}")
    return verdict


def main():
    binary, folder = sys.argv[1], Path(sys.argv[2])
    verdicts = [compare(binary, case) for case in sorted(folder.iterdir()) if (case / "expected.safetensors").exists()]
    passed = sum(verdicts)
    print(f"{passed} passed, {len(verdicts) - passed} failed")
    sys.exit(passed < len(verdicts) or not verdicts)


if __name__ == "__main__":
    main()
