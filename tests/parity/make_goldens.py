"""Writes small random models with the logits that other implementations give them.

    make_goldens.py --seed 1 --out inference-node/tests/goldens

Each folder of the output is a checkpoint (config.json, safetensors) and `expected.safetensors`: `ids` [tokens] and `logits` [tokens,
vocab] of a full forward pass (transformers, use_cache=False, f32; or official.py for what transformers lacks). The cases fix what
must be covered; the seed draws everything else.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import MiniMaxConfig, MiniMaxForCausalLM

from official import Official

# name: (layers: l lightning, s softmax), what is fixed
TRANSFORMERS_CASES = {
    "linear-first": dict(layers="llls", dtype=torch.float32, tokens=150, heads=4, kv_heads=2, block=16),
    "softmax-first": dict(layers="sl", dtype=torch.bfloat16, tokens=90, heads=4, kv_heads=1, block=32),
    "sharded-f16": dict(layers="lsl", dtype=torch.float16, tokens=70, heads=2, kv_heads=2, block=256, shards=3),
    "odd-heads": dict(layers="lsll", dtype=torch.float32, tokens=65, heads=6, kv_heads=3, block=64, head_dim=10),
    "only-linear": dict(layers="lll", dtype=torch.bfloat16, tokens=200, heads=8, kv_heads=8, block=8, head_dim=8),
    "only-softmax": dict(layers="ss", dtype=torch.float32, tokens=140, heads=8, kv_heads=2, block=64, head_dim=12),
    "fused-tied": dict(layers="ll" "s", dtype=torch.bfloat16, tokens=129, heads=3, kv_heads=1, block=64, fused=True, tied=True),
}
OFFICIAL_CASES = {
    "text-01": dict(layers="lllllllsl", dtype=torch.bfloat16, tokens=80, heads=4, kv_heads=2, postnorm=True, shared=0),
    "text-01-shared": dict(layers="ls", dtype=torch.float32, tokens=75, heads=6, kv_heads=2, postnorm=True, shared=20),
    "m1-prenorm": dict(layers="sll", dtype=torch.float16, tokens=70, heads=5, kv_heads=1, postnorm=False, shared=12),
}


def randomise(name, shape, generator):
    """Norms near one, everything else with deviation 1/sqrt(fan in): logits of order one at any depth."""
    noise = torch.randn(shape, generator=generator)
    return 1 + 0.2 * noise if len(shape) == 1 else noise * shape[-1] ** -0.5


def draw(rng, case):
    experts = rng.choice([2, 3, 4, 8])
    return dict(
        hidden_size=rng.choice([24, 32, 40, 48]),
        intermediate_size=rng.choice([16, 20, 28]),
        vocab_size=rng.randrange(60, 131),
        num_local_experts=experts,
        num_experts_per_tok=rng.randrange(1, min(experts, 3) + 1),
        head_dim=case.get("head_dim") or rng.choice([8, 16, 24]),
        num_hidden_layers=len(case["layers"]),
        num_attention_heads=case["heads"],
        num_key_value_heads=case["kv_heads"],
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        hidden_act="silu",
    )


def save(folder, config, tensors, dtype, shards=1):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = sorted(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update({name: file for name in part})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def expect(folder, ids, logits):
    tensors = {"ids": torch.tensor(ids, dtype=torch.int32), "logits": logits.float().contiguous()}
    save_file(tensors, folder / "expected.safetensors")


def split_experts(name, tensor, width):
    """transformers' fused expert tensors under the names of the older generation."""
    prefix = name.split(".mlp.")[0] + ".block_sparse_moe.experts"
    for expert, weights in enumerate(tensor):
        if name.endswith("gate_up_proj"):
            yield f"{prefix}.{expert}.w1.weight", weights[:width]
            yield f"{prefix}.{expert}.w3.weight", weights[width:]
        else:
            yield f"{prefix}.{expert}.w2.weight", weights


def from_transformers(folder, case, rng, generator):
    shape = draw(rng, case)
    names = {"l": "linear_attention", "s": "full_attention"}
    factor = lambda: round(rng.uniform(0.5, 3.5), 3)
    config = MiniMaxConfig(
        **shape,
        layer_types=[names[kind] for kind in case["layers"]],
        block_size=case["block"],
        linear_attn_alpha_factor=factor(), linear_attn_beta_factor=factor(),
        full_attn_alpha_factor=factor(), full_attn_beta_factor=factor(),
        mlp_alpha_factor=factor(), mlp_beta_factor=factor(),
        rope_parameters=dict(rope_type="default", rope_theta=rng.choice([1e4, 1e6, 1e7])),
        tie_word_embeddings=case.get("tied", False),
        attn_implementation="eager",
    )  # fmt: skip
    model = MiniMaxForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(randomise(name, parameter.shape, generator).to(case["dtype"]).float())
    ids = [rng.randrange(shape["vocab_size"]) for _ in range(case["tokens"])]
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    tensors = {}
    for name, tensor in (model.state_dict() if case.get("fused") else dict(model.named_parameters())).items():
        tensor = tensor.detach()
        if ".experts." in name and not case.get("fused"):
            tensors.update(split_experts(name, tensor, shape["intermediate_size"]))
        elif not (case.get("tied") and name.startswith("lm_head")):
            tensors[name if case.get("fused") else name.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = tensor
    save(folder, json.loads(config.to_json_string(use_diff=False)), tensors, case["dtype"], case.get("shards", 1))
    expect(folder, ids, logits)


def from_official(folder, case, rng, generator):
    shape = draw(rng, case)
    head_dim, hidden, width = shape["head_dim"], shape["hidden_size"], shape["intermediate_size"]
    factor = lambda: round(rng.uniform(0.5, 3.0), 3)
    config = dict(
        model_type="minimax_m1" if folder.name.startswith("m1") else "minimax_text_01",
        **shape,
        attn_type_list=[0 if kind == "l" else 1 for kind in case["layers"]],
        layernorm_linear_attention_alpha=factor(), layernorm_linear_attention_beta=factor(),
        layernorm_full_attention_alpha=factor(), layernorm_full_attention_beta=factor(),
        layernorm_mlp_alpha=factor(), layernorm_mlp_beta=factor(),
        postnorm=case["postnorm"],
        rope_theta=1e4,
        rotary_dim=head_dim // 2,
        shared_intermediate_size=case["shared"],
        shared_moe_mode="sigmoid",
    )  # fmt: skip
    all_heads, kv = shape["num_attention_heads"] * head_dim, shape["num_key_value_heads"] * head_dim
    shapes = {"model.embed_tokens.weight": (shape["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    shapes["lm_head.weight"] = (shape["vocab_size"], hidden)
    for layer, kind in enumerate(case["layers"]):
        part = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        if kind == "l":
            part |= {"self_attn.qkv_proj.weight": (3 * all_heads, hidden), "self_attn.norm.weight": (all_heads,)}
            part |= {"self_attn.output_gate.weight": (all_heads, hidden), "self_attn.out_proj.weight": (hidden, all_heads)}
        else:
            part |= {"self_attn.q_proj.weight": (all_heads, hidden), "self_attn.o_proj.weight": (hidden, all_heads)}
            part |= {f"self_attn.{name}_proj.weight": (kv, hidden) for name in "kv"}
        part["block_sparse_moe.gate.weight"] = (shape["num_local_experts"], hidden)
        for expert in range(shape["num_local_experts"]):
            prefix = f"block_sparse_moe.experts.{expert}"
            part |= {f"{prefix}.w1.weight": (width, hidden), f"{prefix}.w3.weight": (width, hidden)}
            part[f"{prefix}.w2.weight"] = (hidden, width)
        if case["shared"]:
            part |= {f"shared_mlp.{name}_proj.weight": (case["shared"], hidden) for name in ("gate", "up")}
            part |= {"shared_mlp.down_proj.weight": (hidden, case["shared"]), "coefficient.weight": (1, hidden)}
        shapes |= {f"model.layers.{layer}.{name}": size for name, size in part.items()}
    tensors = {name: randomise(name, size, generator).to(case["dtype"]) for name, size in shapes.items()}
    ids = [rng.randrange(shape["vocab_size"]) for _ in range(case["tokens"])]
    save(folder, config, tensors, case["dtype"])
    expect(folder, ids, Official(config, tensors).logits(ids))


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seed", type=int, required=True)
    arguments.add_argument("--out", type=Path, required=True)
    arguments = arguments.parse_args()
    for cases, write in ((TRANSFORMERS_CASES, from_transformers), (OFFICIAL_CASES, from_official)):
        for name, case in cases.items():
            seed = f"{arguments.seed}/{name}"
            generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(60))
            write(arguments.out / name, case, random.Random(seed), generator)
            print(f"{name}: {case['tokens']} tokens", flush=True)


if __name__ == "__main__":
    main()
