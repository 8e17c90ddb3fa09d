"""Trains the demo model on the mixture of samples.py; continues from RUN/state.pt where there is one.

The learning rate falls to zero over --minutes of training time, counted over all resumptions. Every few minutes, and on
SIGINT or SIGTERM, the state is written (to a new file, then renamed); now and then the held-out error rates are printed.
"""

import argparse
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

import evaluate
import samples
from model import Config, MiniMax

HERE = Path(__file__).parent
TOKENS_PER_STEP = 2048
LENGTH_MAX = 1024
POOL = 384  # chats drawn at once and sorted by length, so that little of a batch is padding
IMBALANCE_WEIGHT = 0.01


def encode(tokenizer: Tokenizer, segments: samples.Segments) -> tuple[list[int], list[bool]]:
    ids, scored = [], []
    for (_, score), encoding in zip(segments, tokenizer.encode_batch([text for text, _ in segments])):
        ids += encoding.ids
        scored += [score] * len(encoding.ids)
    return ids, scored


def padded_length(length: int) -> int:
    step = 16 if length <= 256 else 64
    return -(-length // step) * step


def batches(tokenizer: Tokenizer, rng: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets [rows, length]; a target of -100 is not scored. Each row is one chat: nothing leaks between chats."""
    while True:
        pool = [encode(tokenizer, samples.sample(rng)[1]) for _ in range(POOL)]
        pool = sorted((chat for chat in pool if len(chat[0]) <= LENGTH_MAX), key=lambda chat: len(chat[0]))
        groups, group = [], []
        for chat in reversed(pool):
            if group and padded_length(len(group[0][0])) * (len(group) + 1) > TOKENS_PER_STEP:
                groups.append(group)
                group = []
            group.append(chat)
        rng.shuffle(groups)  # the unfinished last group is dropped
        for group in groups:
            length = padded_length(len(group[0][0]) - 1)
            inputs, targets = torch.zeros(len(group), length, dtype=torch.long), torch.full((len(group), length), -100)
            for row, (ids, scored) in enumerate(group):
                count = len(ids) - 1
                inputs[row, :count] = torch.tensor(ids[:-1])
                targets[row, :count] = torch.tensor([i if s else -100 for i, s in zip(ids[1:], scored[1:])])
            yield inputs, targets


def learning_rate(peak: float, step: int, progress: float) -> float:
    """A short warm-up, a plateau, and in the last third straight down to a hundredth."""
    return peak * min(1.0, (step + 1) / 100) * max(0.01, min(1.0, 3 * (1 - progress)))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--run", type=Path, required=True, help="folder of this run: state.pt, and model.safetensors at the end")
    arguments.add_argument("--minutes", type=float, required=True, help="training time in total")
    arguments.add_argument("--init", type=Path, help="start from these weights (model.safetensors) instead of random ones")
    arguments.add_argument("--tokenizer", type=Path, default=HERE.parent / "models/sluice-demo/tokenizer.json")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--bf16", action="store_true", help="compute in bf16: faster on a GPU and with AVX-512 BF16, far slower without")
    arguments.add_argument("--peak", type=float, default=1.5e-3, help="highest learning rate")
    arguments.add_argument("--save-minutes", type=float, default=4)
    arguments.add_argument("--evaluate-minutes", type=float, default=12)
    a = arguments.parse_args()

    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(str(a.tokenizer))
    model = MiniMax(Config(vocab_size=tokenizer.get_vocab_size()))
    if a.init:
        model.load(a.init)
    model.to(a.device)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=a.peak, betas=(0.9, 0.95), fused=True)

    a.run.mkdir(parents=True, exist_ok=True)
    state_path = a.run / "state.pt"
    step, tokens, elapsed = 0, 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, map_location=a.device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, tokens, elapsed = state["step"], state["tokens"], state["elapsed"]
        print(f"continuing at step {step} after {elapsed / 60:.1f} minutes")

    def save() -> None:
        state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step, tokens=tokens, elapsed=elapsed)
        torch.save(state, state_path.with_suffix(".new"))
        state_path.with_suffix(".new").rename(state_path)

    total, active = model.parameter_counts()
    print(f"{total / 1e6:.2f} M parameters, {active / 1e6:.2f} M active; {a.device}, {torch.get_num_threads()} threads", flush=True)
    source = batches(tokenizer, random.Random(step))
    mean, saved, evaluated, clock = None, elapsed, elapsed, time.monotonic()
    interrupted: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: interrupted.append(number))
    while elapsed < a.minutes * 60 and not interrupted:
        inputs, targets = (tensor.to(a.device) for tensor in next(source))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(a.peak, step, elapsed / (a.minutes * 60))
        with torch.autocast(a.device, torch.bfloat16, enabled=a.bf16):
            hidden, imbalance = model.hidden(inputs)
            scored = targets != -100
            loss = F.cross_entropy(model.logits(hidden[scored]), targets[scored])
        (loss + IMBALANCE_WEIGHT * imbalance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + int((inputs != 0).sum())
        elapsed, clock = elapsed + time.monotonic() - clock, time.monotonic()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"{elapsed / 60:6.1f} min  step {step:6}  {tokens / 1e6:7.2f} M tokens ({tokens / elapsed:.0f}/s)  loss {mean:.3f}"
                  f"  imbalance {imbalance.item():.2f}  rate {optimizer.param_groups[0]['lr']:.1e}", flush=True)  # fmt: skip
        if elapsed - saved > a.save_minutes * 60:
            saved = elapsed
            save()
        if elapsed - evaluated > a.evaluate_minutes * 60:
            evaluated = elapsed
            evaluate.print_rates(model, tokenizer, count=40)
    save()
    if interrupted:
        sys.exit(f"interrupted at {elapsed / 60:.1f} of {a.minutes:g} minutes; the same command goes on from here")
    model.save(a.run / "model.safetensors")
    print(f"{tokens / 1e6:.2f} M tokens in {elapsed / 60:.1f} minutes; wrote {a.run / 'model.safetensors'}")


if __name__ == "__main__":
    main()
