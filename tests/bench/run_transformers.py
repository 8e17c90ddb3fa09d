"""Runs a twin in transformers, in a process of its own: times it, or prints its logits. One JSON object on stdout.

Timing is of the model's own forward pass with its cache, without `generate` around it, which only costs. Explicit `position_ids` are
needed for right answers: where layer 0 is linear, the cache reports a length of 0.
"""

import argparse
import json
import time

import torch
from transformers import MiniMaxForCausalLM


def load(arguments):
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    model = MiniMaxForCausalLM.from_pretrained(arguments.model, dtype=dtype, attn_implementation="sdpa").eval()
    model.set_experts_implementation(arguments.experts)
    # The decay buffers are computed in the constructor and are not in the file: computed anew, whatever the loader did with them.
    for layer in model.model.layers:
        mixer = layer.self_attn
        if hasattr(mixer, "slope_rate"):
            rate = mixer.get_slope_rate()
            mixer.slope_rate.copy_(rate)
            for buffer, value in zip((mixer.query_decay, mixer.key_decay, mixer.diagonal_decay), mixer.decay_factors(rate)):
                buffer.copy_(value)
    return model


def ids(model, batch, length):
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator)


def step(model, tokens, first, cache):
    positions = torch.arange(first, first + tokens.shape[1]).expand(tokens.shape[0], -1)
    return model(tokens, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)


def prefill(model, batch, length):
    tokens = ids(model, batch, length)
    started = time.perf_counter()
    out = step(model, tokens, 0, None)
    return time.perf_counter() - started, out


def decode(model, batch, depth, new):
    _, out = prefill(model, batch, depth)
    started = time.perf_counter()
    for position in range(depth, depth + new):
        out = step(model, out.logits[:, -1:].argmax(-1), position, out.past_key_values)
    return time.perf_counter() - started


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--model", required=True)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--dtype", default="bfloat16")
    arguments.add_argument("--experts", default="grouped_mm")
    arguments.add_argument("--prefill", type=int, default=512)
    arguments.add_argument("--depth", type=int, default=128)
    arguments.add_argument("--new", type=int, default=32)
    arguments.add_argument("--batch", default="1,8,32")
    arguments.add_argument("--logits", help="print the logits of these ids, each position once from a whole pass and once cached")
    arguments = arguments.parse_args()
    with torch.inference_mode():
        model = load(arguments)
        if arguments.logits:
            tokens = torch.tensor([[int(id) for id in arguments.logits.split(",")]])
            whole = model(tokens, use_cache=False).logits[0]
            out = step(model, tokens[:, :-4], 0, None)
            cached = [out.logits[0, -1]]
            for position in range(tokens.shape[1] - 4, tokens.shape[1]):
                out = step(model, tokens[:, position : position + 1], position, out.past_key_values)
                cached.append(out.logits[0, -1])
            print(json.dumps(dict(logits=whole.float().tolist(), cached=torch.stack(cached).float().tolist())))
            return
        prefill(model, 1, arguments.prefill)
        rates = dict(prefill=arguments.prefill / min(prefill(model, 1, arguments.prefill)[0] for _ in range(2)))
        for batch in map(int, arguments.batch.split(",")):
            rates[f"B={batch}"] = batch * arguments.new / decode(model, batch, arguments.depth, arguments.new)
        print(json.dumps(rates))


if __name__ == "__main__":
    main()
