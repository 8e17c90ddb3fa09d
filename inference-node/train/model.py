"""The MiniMax architecture for training: lightning (linear) attention, a few softmax layers, top-2 mixture of experts.

Parameter names and shapes are those of transformers' `MiniMaxForCausalLM`, so an export is a copy. `hidden` computes whole
sequences in blocks, for training; `step` computes one token a row from a cache, for evaluation.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

LINEAR, SOFTMAX = "linear_attention", "full_attention"


@dataclass
class Config:
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 192
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    layer_types: list[str] = field(default_factory=lambda: [LINEAR] * 4 + [SOFTMAX, LINEAR])
    block_size: int = 64
    rope_theta: float = 1e7
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 131072
    alpha: float = 1.8612  # (2 x layers) ^ 1/4, DeepNorm's weight of the residual

    def to_json(self) -> str:
        """config.json as transformers and the engine read it."""
        fields = asdict(self)
        alpha, theta = fields.pop("alpha"), fields.pop("rope_theta")
        for part in ("linear_attn", "full_attn", "mlp"):
            fields |= {f"{part}_alpha_factor": alpha, f"{part}_beta_factor": 1.0}
        fields |= dict(
            architectures=["MiniMaxForCausalLM"], model_type="minimax", dtype="bfloat16", hidden_act="silu",
            rope_parameters={"rope_type": "default", "rope_theta": theta}, tie_word_embeddings=True,
            attention_dropout=0.0, initializer_range=0.02, router_aux_loss_coef=0.001, bos_token_id=1, eos_token_id=2,
            pad_token_id=0, use_cache=True,
        )  # fmt: skip
        return json.dumps(dict(sorted(fields.items())), indent=2) + "\n"


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class LightningAttention(nn.Module):
    """o_i = sum over j <= i of exp(-s (i - j)) (q_i . k_j) v_j, in blocks with an f32 state between them."""

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.heads, self.dim, self.block = c.num_attention_heads, c.head_dim, c.block_size
        width = self.heads * self.dim
        self.qkv_proj = nn.Linear(c.hidden_size, 3 * width, bias=False)
        self.output_gate = nn.Linear(c.hidden_size, width, bias=False)
        self.out_proj = nn.Linear(width, c.hidden_size, bias=False)
        self.norm = RMSNorm(width, 1e-6)
        depth = 1 - layer / (c.num_hidden_layers - 1 + 1e-5) + 1e-5
        slopes = 2.0 ** (-8 / self.heads * (torch.arange(self.heads) + 1.0)) * depth
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(self, x: Tensor, _rope: tuple[Tensor, Tensor]) -> Tensor:
        rows, length, _ = x.shape
        # The recurrence is exact for any block; short sequences take one.
        block = length if length <= 256 else self.block
        blocks = length // block
        assert blocks * block == length, f"a length above 256 must be a multiple of {self.block}, not {length}"
        qkv = F.silu(self.qkv_proj(x)).view(rows, blocks, block, self.heads, 3 * self.dim).transpose(2, 3)
        q, k, v = qkv.split(self.dim, -1)
        slope = self.slopes.float()[:, None, None]
        at = torch.arange(block, device=x.device, dtype=torch.float32)
        within = torch.exp(-slope * (at[:, None] - at).clamp(min=0)).tril().to(x.dtype)
        out = ((q @ k.transpose(-1, -2)) * within) @ v
        if blocks > 1:
            from_start = torch.exp(-slope * (at[:, None] + 1)).to(x.dtype)
            to_end = torch.exp(-slope * (block - 1 - at[:, None])).to(x.dtype)
            added = ((k * to_end).transpose(-1, -2) @ v).float()
            state, states = torch.zeros_like(added[:, 0]), []
            for i in range(blocks):
                states.append(state)
                state = state * torch.exp(-slope * block) + added[:, i]
            out = out + (q * from_start) @ torch.stack(states, 1).to(x.dtype)
        return self.gated(x, out.transpose(2, 3).reshape(rows, length, -1))

    def step(self, x: Tensor, _rope: tuple[Tensor, Tensor], cache: dict[str, Tensor]) -> Tensor:
        rows = x.shape[0]
        q, k, v = F.silu(self.qkv_proj(x)).view(rows, self.heads, 1, 3 * self.dim).split(self.dim, -1)
        state = cache.get("state", torch.zeros(rows, self.heads, self.dim, self.dim, device=x.device))
        cache["state"] = state * torch.exp(-self.slopes.float())[:, None, None] + k.transpose(-1, -2) @ v
        return self.gated(x, (q @ cache["state"]).reshape(rows, 1, -1))

    def gated(self, x: Tensor, out: Tensor) -> Tensor:
        return self.out_proj(torch.sigmoid(self.output_gate(x)) * self.norm(out))


class SoftmaxAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, c: Config, _layer: int):
        super().__init__()
        self.heads, self.kv_heads, self.dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return self.attend(x, *self.rotated(x, rope), causal=True)

    def step(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: dict[str, Tensor]) -> Tensor:
        q, k, v = self.rotated(x, rope)
        cache["k"] = torch.cat((cache["k"], k), 2) if "k" in cache else k
        cache["v"] = torch.cat((cache["v"], v), 2) if "v" in cache else v
        return self.attend(x, q, cache["k"], cache["v"], causal=False)

    def rotated(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin = rope

        def heads(projected: Tensor) -> Tensor:
            return projected.view(*x.shape[:2], -1, self.dim).transpose(1, 2)

        def rotate(z: Tensor) -> Tensor:
            first, second = z.chunk(2, -1)
            return z * cos + torch.cat((-second, first), -1) * sin

        return rotate(heads(self.q_proj(x))), rotate(heads(self.k_proj(x))), heads(self.v_proj(x))

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.o_proj(out.transpose(1, 2).reshape(*x.shape[:2], -1))


class Experts(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(c.num_local_experts, 2 * c.intermediate_size, c.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(c.num_local_experts, c.hidden_size, c.intermediate_size))


class Router(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c.num_local_experts, c.hidden_size))


class MixtureOfExperts(nn.Module):
    """Each token goes through its top-k experts. Also returns the load-balancing loss (1 x k when balanced)."""

    def __init__(self, c: Config):
        super().__init__()
        self.top_k, self.count = c.num_experts_per_tok, c.num_local_experts
        self.gate, self.experts = Router(c), Experts(c)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.reshape(-1, x.shape[-1])
        probabilities = F.linear(flat, self.gate.weight.to(flat.dtype)).float().softmax(-1)
        weights, chosen = probabilities.topk(self.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        load = F.one_hot(chosen, self.count).float().sum(1).mean(0)
        imbalance = self.count * (load * probabilities.mean(0)).sum()

        chosen = chosen.reshape(-1)
        order = chosen.argsort(stable=True)
        tokens = order // self.top_k
        gate_up = self.experts.gate_up_proj.to(flat.dtype)
        down = self.experts.down_proj.to(flat.dtype)
        parts = flat[tokens].split(torch.bincount(chosen, minlength=self.count).tolist())
        outputs = []
        for expert, part in enumerate(parts):
            gate, up = F.linear(part, gate_up[expert]).chunk(2, -1)
            outputs.append(F.linear(F.silu(gate) * up, down[expert]))
        weighted = torch.cat(outputs) * weights.reshape(-1)[order].to(flat.dtype)[:, None]
        return torch.zeros_like(flat).index_add_(0, tokens, weighted).view(x.shape), imbalance


class Layer(nn.Module):
    """Postnorm: the residual carries the normed value."""

    def __init__(self, c: Config, layer: int):
        super().__init__()
        attention = LightningAttention if c.layer_types[layer] == LINEAR else SoftmaxAttention
        self.self_attn, self.mlp, self.alpha = attention(c, layer), MixtureOfExperts(c), c.alpha
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        x = self.input_layernorm(x)
        attended = self.self_attn(x, rope) if cache is None else self.self_attn.step(x, rope, cache)
        x = self.post_attention_layernorm(x * self.alpha + attended)
        y, imbalance = self.mlp(x)
        return x * self.alpha + y, imbalance


class Body(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class MiniMax(nn.Module):
    """The embedding is also the head."""

    def __init__(self, c: Config):
        super().__init__()
        self.config, self.model = c, Body(c)
        small = (8 * c.num_hidden_layers) ** -0.25  # DeepNorm's gain for what writes to the residual
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                residual = any(part in name for part in ("out_proj", "o_proj", "v_proj", "down_proj", "gate_up"))
                scaled = (small if residual else 1.0) * parameter.shape[-1] ** -0.5
                nn.init.normal_(parameter, std=0.02 if "embed" in name or ".gate." in name else scaled)

    def rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        c = self.config
        frequencies = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, device=positions.device).float() / c.head_dim)
        angles = positions.float()[:, None] * frequencies
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def hidden(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Final hidden states [rows, length, hidden], and the mean imbalance of the routers."""
        x = self.model.embed_tokens(ids)
        if torch.is_autocast_enabled(ids.device.type):
            x = x.to(torch.get_autocast_dtype(ids.device.type))
        rope = self.rope(torch.arange(ids.shape[1], device=ids.device), x.dtype)
        imbalances = []
        for layer in self.model.layers:
            x, imbalance = layer(x, rope)
            imbalances.append(imbalance)
        return self.model.norm(x), torch.stack(imbalances).mean()

    def new_cache(self) -> list[dict[str, Tensor]]:
        return [{} for _ in self.model.layers]

    def step(self, ids: Tensor, position: int, cache: list[dict[str, Tensor]]) -> Tensor:
        """Logits [rows, vocabulary] after one more token in each row, all of them at the same position."""
        x = self.model.embed_tokens(ids)[:, None]
        rope = self.rope(torch.tensor([position], device=ids.device), x.dtype)
        for layer, layer_cache in zip(self.model.layers, cache):
            x, _ = layer(x, rope, layer_cache)
        return self.logits(self.model.norm(x)[:, 0])

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.embed_tokens.weight).float()

    def parameter_counts(self) -> tuple[int, int]:
        """All, and those that one token passes through."""
        total = sum(p.numel() for p in self.parameters())
        experts = sum(p.numel() for name, p in self.named_parameters() if "experts" in name)
        return total, total - experts + experts * self.config.num_experts_per_tok // self.config.num_local_experts

    def save(self, path: Path) -> None:
        tensors = {name: value.detach().to(torch.bfloat16).contiguous().cpu() for name, value in self.state_dict().items()}
        save_file(tensors, path, metadata={"format": "pt"})

    def load(self, path: Path) -> None:
        tensors = {name: value.float() for name, value in load_file(path).items() if name != "lm_head.weight"}
        self.load_state_dict(tensors)
