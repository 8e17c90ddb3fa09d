"""Runs `sluice-node` and reads what it prints."""

import json
import os
import subprocess
from pathlib import Path


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


class Others:
    """How much of the processor other processes took since this was made: they slow spinning threads down by far more than their share."""

    def __init__(self):
        self.start = self.now()

    @staticmethod
    def now():
        """Seconds: passed on all processors, busy by anybody, busy by this process and the children it waited for."""
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        own = os.times()
        ticks = os.sysconf("SC_CLK_TCK")
        idle = fields[3] + fields[4]
        return sum(fields) / ticks, (sum(fields) - idle) / ticks, sum(own[:4])

    def share(self):
        passed, busy, own = (now - start for now, start in zip(self.now(), self.start))
        return max(0.0, (busy - own) / max(passed, 1e-9))


def table(rows):
    """Markdown from a list of rows; the first is the header, and only the first column is text."""
    rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [rows[0], rule, *rows[1:]])
