"""Runs `sluice-node` and reads what it prints."""

import json
import subprocess


class Node:
    def __init__(self, binary, threads):
        self.binary, self.threads = binary, threads

    def ask(self, command, model, **flags):
        """The one JSON object of `sluice-node COMMAND`. A flag that is None is left out."""
        words = [self.binary, command, "--model", model, "--threads", self.threads, "--json"]
        for name, value in flags.items():
            if value is True:
                words += [f"--{name.replace('_', '-')}"]
            elif value is not None:
                words += [f"--{name.replace('_', '-')}", value]
        ran = subprocess.run([str(word) for word in words], capture_output=True, text=True)
        if ran.returncode != 0:
            raise SystemExit(f"error: {' '.join(map(str, words))[:400]}\n       {ran.stderr.strip()}")
        return json.loads(ran.stdout)

    def bench(self, model, prompt, new, batch=1, dtype=None):
        return self.ask("bench", model, prompt_tokens=prompt, new_tokens=new, batch=batch, dtype=dtype)


def table(rows):
    """Markdown from a list of rows; the first is the header, and only the first column is text."""
    rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [rows[0], rule, *rows[1:]])
