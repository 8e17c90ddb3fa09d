"""The published MiniMax-Text-01 / M1 formulas as a float64 recurrence in torch, one token at a time.

transformers' port covers neither postnorm = false, nor the shared expert, nor rotary_dim below the head dim, nor head counts
that are no power of two. This is the independent yardstick for those: it shares no code with the engine.
"""

import math

import torch


def slopes(heads):
    def geometric(n):
        first = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [first ** (i + 1) for i in range(n)]

    if math.log2(heads).is_integer():
        return geometric(heads)
    below = 2 ** math.floor(math.log2(heads))
    return geometric(below) + slopes(2 * below)[0::2][: heads - below]


def rms(x, weight, eps):
    return weight * x / torch.sqrt(x.pow(2).mean() + eps)


class Official:
    def __init__(self, config, tensors):
        self.c = config
        self.t = {name: tensor.double() for name, tensor in tensors.items()}

    def logits(self, ids):
        c, t = self.c, self.t
        depth = c["num_hidden_layers"]
        memory = [{} for _ in range(depth)]
        rows = []
        for position, token in enumerate(ids):
            x = t["model.embed_tokens.weight"][token]
            for layer in range(depth):
                x = self.layer(layer, memory[layer], position, x)
            rows.append(t["lm_head.weight"] @ rms(x, t["model.norm.weight"], c["rms_norm_eps"]))
        return torch.stack(rows).float()

    def layer(self, layer, memory, position, x):
        c = self.c
        w = lambda name: self.t[f"model.layers.{layer}.{name}"]
        linear = c["attn_type_list"][layer] == 0
        kind = "linear" if linear else "full"
        h = rms(x, w("input_layernorm.weight"), c["rms_norm_eps"])
        residual = h if c["postnorm"] else x
        mixed = self.lightning(w, layer, memory, h) if linear else self.softmax(w, memory, position, h)
        y = residual * c[f"layernorm_{kind}_attention_alpha"] + mixed * c[f"layernorm_{kind}_attention_beta"]
        g = rms(y, w("post_attention_layernorm.weight"), c["rms_norm_eps"])
        residual = g if c["postnorm"] else y
        return residual * c["layernorm_mlp_alpha"] + self.mixture(w, g) * c["layernorm_mlp_beta"]

    def lightning(self, w, layer, memory, h):
        heads, d = self.c["num_attention_heads"], self.c["head_dim"]
        qkv = torch.nn.functional.silu(w("self_attn.qkv_proj.weight") @ h).view(heads, 3, d)
        q, k, v = qkv.unbind(1)
        fade = 1 - layer / (self.c["num_hidden_layers"] - 1) + 1e-5
        ratio = torch.exp(-torch.tensor(slopes(heads), dtype=torch.float64) * fade)
        state = memory.get("state", torch.zeros(heads, d, d, dtype=torch.float64))
        memory["state"] = ratio[:, None, None] * state + k[:, :, None] * v[:, None, :]
        out = torch.einsum("hd,hde->he", q, memory["state"]).reshape(-1)
        gate = torch.sigmoid(w("self_attn.output_gate.weight") @ h)
        return w("self_attn.out_proj.weight") @ (gate * rms(out, w("self_attn.norm.weight"), 1e-6))

    def softmax(self, w, memory, position, h):
        c = self.c
        heads, kv, d, rotary = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"], c["rotary_dim"]
        angle = position * c["rope_theta"] ** (-torch.arange(0, rotary, 2, dtype=torch.float64) / rotary)

        def turn(x):
            a, b, rest = x[:, : rotary // 2], x[:, rotary // 2 : rotary], x[:, rotary:]
            cos, sin = angle.cos(), angle.sin()
            return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=1)

        q = turn((w("self_attn.q_proj.weight") @ h).view(heads, d))
        memory.setdefault("k", []).append(turn((w("self_attn.k_proj.weight") @ h).view(kv, d)))
        memory.setdefault("v", []).append((w("self_attn.v_proj.weight") @ h).view(kv, d))
        k = torch.stack(memory["k"]).repeat_interleave(heads // kv, dim=1)
        v = torch.stack(memory["v"]).repeat_interleave(heads // kv, dim=1)
        weights = torch.softmax(torch.einsum("hd,thd->ht", q, k) / math.sqrt(d), dim=1)
        return w("self_attn.o_proj.weight") @ torch.einsum("ht,thd->hd", weights, v).reshape(-1)

    def mixture(self, w, g):
        silu = torch.nn.functional.silu
        weights = torch.softmax(w("block_sparse_moe.gate.weight") @ g, dim=0)
        top, chosen = weights.topk(self.c["num_experts_per_tok"])
        out = torch.zeros_like(g)
        for weight, expert in zip(top / top.sum(), chosen.tolist()):
            part = lambda name: w(f"block_sparse_moe.experts.{expert}.{name}.weight")
            out += weight * (part("w2") @ (silu(part("w1") @ g) * (part("w3") @ g)))
        if not self.c["shared_intermediate_size"]:
            return out
        part = lambda name: w(f"shared_mlp.{name}.weight")
        shared = part("down_proj") @ (silu(part("gate_proj") @ g) * (part("up_proj") @ g))
        share = torch.sigmoid(w("coefficient.weight") @ g)
        return out * (1 - share) + shared * share
