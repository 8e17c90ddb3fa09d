"""Held-out error rates of a model folder, and greedy samples: `python evaluate.py MODEL_DIR [--json]`.

An answer counts only if it is, token by token, one of the right ones (greedy). A story counts if it holds every detail that the
prompt named, and comes to an end.
"""

import argparse
import json
import random
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer

import samples
import stories
from model import Config, MiniMax

EXACT = ["product", "smalltalk", "refusal", "world", "sums", "acquaintance", "people", "lookup", "needle", "lists", "objects", "tools"]
END_ID = 2
BATCH = 50

Verdict = tuple[float, list[tuple[str, str, str]]]  # share of wrong answers, and some of them: prompt, expected, given


def answers_of(answer: str) -> list[str]:
    """All right answers where `answer` is one."""
    if answer in samples.DONT_KNOW:
        return samples.DONT_KNOW
    for name in ("smalltalk.txt", "facts.txt", "world.txt"):
        for fact in samples.facts(name):
            if answer in fact.answers:
                return fact.answers
    greetings = re.fullmatch(r"(?:Nice to meet you, (\w+)!|Hello, (\w+)! How can I help you today\?)", answer)
    if greetings:
        name = greetings[1] or greetings[2]
        return [f"Nice to meet you, {name}!", f"Hello, {name}! How can I help you today?"]
    return [answer]


def first_exchange(segments: samples.Segments) -> tuple[str, str]:
    """The text up to the first thing the assistant says, and that."""
    prompt = ""
    for text, scored in segments:
        if scored:
            return prompt, text.removesuffix(samples.END)
        prompt += text
    raise ValueError("the assistant says nothing")


@torch.no_grad()
def generate(model: MiniMax, tokenizer: Tokenizer, prompts: list[str], tokens_max: int, temperature: float = 0.0) -> list[str]:
    """All prompts side by side, token by token; greedy unless a temperature is given."""
    device = next(model.parameters()).device
    rows = [tokenizer.encode(prompt).ids for prompt in prompts]
    starts = [len(row) for row in rows]
    cache = model.new_cache()
    for position in range(max(starts) + tokens_max):
        done = [END_ID in row[start:] or len(row) >= start + tokens_max for row, start in zip(rows, starts)]
        if all(done):
            break
        ids = torch.tensor([row[position] if position < len(row) else 0 for row in rows], device=device)
        logits = model.step(ids, position, cache)
        if temperature > 0:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0].tolist()
        else:
            chosen = logits.argmax(-1).tolist()
        for row, token, finished in zip(rows, chosen, done):
            if position == len(row) - 1 and not finished:
                row.append(token)
    return [tokenizer.decode(row[start:], skip_special_tokens=False) for row, start in zip(rows, starts)]


@torch.no_grad()
def would_say(model: MiniMax, tokenizer: Tokenizer, prompt: str, answer: str) -> bool:
    """Whether greedy decoding gives exactly that: at each of its tokens, it must be the likeliest. One pass instead of many."""
    before, after = tokenizer.encode(prompt).ids, tokenizer.encode(answer + samples.END).ids
    ids = before + after[:-1]
    length = len(ids) if len(ids) <= 256 else -(-len(ids) // 64) * 64
    padded = torch.tensor([ids + [0] * (length - len(ids))], device=next(model.parameters()).device)
    hidden, _ = model.hidden(padded)
    return model.logits(hidden[0, len(before) - 1 : len(ids)]).argmax(-1).tolist() == after


def error_rate(model: MiniMax, tokenizer: Tokenizer, kind: str, count: int, shown: int = 2) -> Verdict:
    rng = random.Random(f"held out: {kind}")
    exchanges = [first_exchange(samples.held_out(kind, rng)) for _ in range(count)]
    wrong = [(prompt, answer) for prompt, answer in exchanges
             if not any(would_say(model, tokenizer, prompt, right) for right in answers_of(answer))]  # fmt: skip
    texts = generate(model, tokenizer, [prompt for prompt, _ in wrong[:shown]], 60) if wrong and shown else []
    return len(wrong) / count, [(prompt, answer, text) for (prompt, answer), text in zip(wrong, texts)]


def story_error_rate(model: MiniMax, tokenizer: Tokenizer, count: int) -> Verdict:
    rng = random.Random("held out: story")
    prompts = []
    while len(prompts) < count:
        prompt, _ = first_exchange(samples.held_out("story", rng))
        if details(prompt):
            prompts.append(prompt)
    texts = [t for i in range(0, count, BATCH) for t in generate(model, tokenizer, prompts[i : i + BATCH], 220)]
    wrong = [(prompt, ", ".join(details(prompt)), text) for prompt, text in zip(prompts, texts)
             if not text.endswith(samples.END) or any(detail not in text for detail in details(prompt))]  # fmt: skip
    return len(wrong) / count, wrong


def details(prompt: str) -> list[str]:
    """The names, things, colours and animals that a story prompt asks for."""
    known = {*stories.NAMES, *stories.THINGS, *stories.COLOURS, *stories.ANIMALS}
    return [word for word in re.findall(r"[A-Za-z]+", prompt.split("user name=user\n")[-1].split(samples.END)[0]) if word in known]


def rates(model: MiniMax, tokenizer: Tokenizer, count: int, shown: int = 0) -> dict[str, Verdict]:
    found = {kind: error_rate(model, tokenizer, kind, count, shown) for kind in EXACT}
    return found | {"story details": story_error_rate(model, tokenizer, count)}


def print_rates(model: MiniMax, tokenizer: Tokenizer, count: int) -> None:
    line = "  ".join(f"{kind} {100 * rate:.0f}%" for kind, (rate, _) in rates(model, tokenizer, count).items())
    print(f"held-out errors of {count}: {line}", flush=True)


SHOWN = ["Hello!", "What is Sluice?", "who made you", "How can I receive the answer token by token?", "What happens if my client hangs up?",
         "What is the capital of France?", "What is the capital of Australia?", "Tell me a story about a red kite.",
         "Tell me a story about a fox named Mia and her friend Sam.", "Write a story about a robot.", "What is 7 + 5?", "What is 48 + 37?",
         "My name is Ada.", "I feel a bit lost today.", "Explain how a car engine works.", "Which database should I use for my shop?",
         "Anna is a baker and lives in Rome. Jun is a pilot and lives in Oslo.\nWhere does Jun live?"]  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("model", type=Path)
    arguments.add_argument("--count", type=int, default=100, help="held-out items of each kind")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--json", action="store_true", help="one JSON object of error rates, nothing else")
    arguments.add_argument("--wrong", type=int, default=0, help="show that many wrong answers of each kind")
    a = arguments.parse_args()
    torch.set_num_threads(a.threads)
    tokenizer = Tokenizer.from_file(str(a.model / "tokenizer.json"))
    model = MiniMax(Config(vocab_size=tokenizer.get_vocab_size()))
    model.load(a.model / "model.safetensors")
    found = rates(model, tokenizer, a.count, a.wrong)
    if a.json:
        print(json.dumps({kind: rate for kind, (rate, _) in found.items()}))
        return
    for kind, (rate, wrong) in found.items():
        print(f"{kind:14} {100 * rate:5.1f} % wrong of {a.count}")
        for prompt, expected, given in wrong[: a.wrong]:
            print(f"    asked    {prompt[-200:]!r}\n    expected {expected!r}\n    given    {given!r}")
    prompts = ["".join(text for text, _ in samples.chat([(question, "")])[:1]) for question in SHOWN]
    for question, text in zip(SHOWN, generate(model, tokenizer, prompts, 200)):
        print(f"\n> {question}\n{text.removesuffix(samples.END)}")


if __name__ == "__main__":
    main()
