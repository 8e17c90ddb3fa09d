"""Random models of the MiniMax family in the three forms in which the three systems read them.

A twin is made once by `sluice-node init` from one config and one seed. transformers reads the same weights through a folder with a
config of its own words; llama.cpp reads a GGUF file with the same bytes under its tensor names.
"""

import json
import mmap
import os
import shutil
import subprocess
from pathlib import Path

SEED = 7
CONTEXT = 1 << 21


def config(layers, hidden, width, experts, top, heads, kv_heads, head_dim, vocabulary):
    """`layers`: one letter each, l lightning, s softmax. The residual weights are those of MiniMax-M1 at this depth."""
    alpha = (2 * len(layers)) ** 0.25
    return dict(
        model_type="minimax_text_01",
        architectures=["MiniMaxText01ForCausalLM"],
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=len(layers),
        attn_type_list=[0 if kind == "l" else 1 for kind in layers],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=head_dim,
        rope_theta=10_000_000,
        num_local_experts=experts,
        num_experts_per_tok=top,
        shared_intermediate_size=0,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        hidden_act="silu",
        postnorm=True,
        layernorm_linear_attention_alpha=alpha,
        layernorm_linear_attention_beta=1.0,
        layernorm_full_attention_alpha=alpha,
        layernorm_full_attention_beta=1.0,
        layernorm_mlp_alpha=alpha,
        layernorm_mlp_beta=1.0,
        tie_word_embeddings=False,
    )


# 918 M parameters, 201 M of them active: the twin that the bars are about.
PEERS = config("lllllllsllllllls", 1024, 1024, 16, 2, 16, 4, 64, 16_384)


def parameters(c):
    """Parameters in all, and those that take part in one token (of the embedding table a row: none)."""
    h, attended = c["hidden_size"], c["num_attention_heads"] * c["head_dim"]
    lightning = 5 * h * attended + attended
    softmax = 2 * h * attended + 2 * h * c["num_key_value_heads"] * c["head_dim"]
    mixers = sum(softmax if kind else lightning for kind in c["attn_type_list"])
    expert, depth = 3 * h * c["intermediate_size"], c["num_hidden_layers"]
    rest = mixers + depth * (h * c["num_local_experts"] + 2 * h) + h + h * c["vocab_size"]
    total = rest + depth * c["num_local_experts"] * expert + h * c["vocab_size"]
    return total, rest + depth * c["num_experts_per_tok"] * expert


def make(node, folder, twin):
    """The checkpoint that `sluice-node` reads, unless it is there with this very config."""
    written = json.dumps(twin, indent=1) + "\n"
    if (folder / "config.json").is_file() and (folder / "config.json").read_text() == written:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    asked = folder / "asked.json"
    asked.write_text(written)
    subprocess.run([node, "init", "--config", asked, "--seed", str(SEED), "--out", folder], check=True, stdout=subprocess.DEVNULL)
    asked.unlink()
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    return folder


def byte_tokenizer():
    """One token a byte: enough to load; every run is fed ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    return dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=[],
        normalizer=None,
        pre_tokenizer=byte_level,
        post_processor=None,
        decoder=byte_level,
        model=dict(type="BPE", vocab={character: index for index, character in enumerate(characters)}, merges=[]),
    )


def for_transformers(folder, twin):
    """A folder beside `folder` with the same weights and the config of transformers' `minimax`."""
    out = folder.with_name(folder.name + "-transformers")
    out.mkdir(exist_ok=True)
    kinds = ["full_attention" if kind else "linear_attention" for kind in twin["attn_type_list"]]
    same = ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
            "num_local_experts num_experts_per_tok max_position_embeddings rms_norm_eps hidden_act tie_word_embeddings").split()  # fmt: skip
    theirs = {name: twin[name] for name in same} | dict(
        model_type="minimax",
        architectures=["MiniMaxForCausalLM"],
        layer_types=kinds,
        block_size=256,
        linear_attn_alpha_factor=twin["layernorm_linear_attention_alpha"],
        linear_attn_beta_factor=1.0,
        full_attn_alpha_factor=twin["layernorm_full_attention_alpha"],
        full_attn_beta_factor=1.0,
        mlp_alpha_factor=twin["layernorm_mlp_alpha"],
        mlp_beta_factor=1.0,
        rope_parameters=dict(rope_type="default", rope_theta=twin["rope_theta"]),
        dtype="bfloat16",
    )
    (out / "config.json").write_text(json.dumps(theirs, indent=1) + "\n")
    weights = out / "model.safetensors"
    weights.unlink(missing_ok=True)
    os.link(folder / "model.safetensors", weights)
    return out


def for_llama_cpp(folder, twin):
    """`folder`.gguf in bf16; norms and routers in f32, as llama.cpp's own converter writes them."""
    import gguf
    import numpy

    out = folder.with_name(folder.name + ".gguf")
    if out.is_file() and out.stat().st_mtime > (folder / "model.safetensors").stat().st_mtime:
        return out
    with open(folder / "model.safetensors", "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    begin = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:begin])
    entries.pop("__metadata__", None)

    def bf16(name):
        """`[rows.., columns]` of 16-bit patterns."""
        first, last = entries[name]["data_offsets"]
        words = numpy.frombuffer(data, numpy.uint16, (last - first) // 2, begin + first)
        return words.reshape(entries[name]["shape"])

    partial = out.with_name(out.name + ".partial")
    writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.MINIMAX01])
    writer.add_name(folder.name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(twin["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_context_length(twin["max_position_embeddings"])
    writer.add_embedding_length(twin["hidden_size"])
    writer.add_block_count(twin["num_hidden_layers"])
    writer.add_feed_forward_length(twin["intermediate_size"])
    writer.add_head_count(twin["num_attention_heads"])
    writer.add_head_count_kv(twin["num_key_value_heads"])
    writer.add_key_length(twin["head_dim"])
    writer.add_value_length(twin["head_dim"])
    writer.add_rope_dimension_count(twin["rotary_dim"])
    writer.add_rope_freq_base(twin["rope_theta"])
    writer.add_layer_norm_rms_eps(twin["rms_norm_eps"])
    writer.add_residual_scale(twin["layernorm_mlp_alpha"])
    writer.add_expert_count(twin["num_local_experts"])
    writer.add_expert_used_count(twin["num_experts_per_tok"])

    def add(name, words, wide=False):
        if wide or words.ndim == 1:
            writer.add_tensor(name, (words.astype(numpy.uint32) << 16).view(numpy.float32))
        else:
            raw = numpy.ascontiguousarray(words).view(numpy.uint8)
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)

    for name, theirs in (("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")):
        add(f"{theirs}.weight", bf16(f"{name}.weight"))
    lightning = dict(qkv_proj="attn_qkv", output_gate="attn_gate", out_proj="attn_output", norm="attn_norm_2")
    softmax = dict(q_proj="attn_q", k_proj="attn_k", v_proj="attn_v", o_proj="attn_output")
    for layer, kind in enumerate(twin["attn_type_list"]):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        add(f"{theirs}.attn_norm.weight", bf16(f"{ours}.input_layernorm.weight"))
        add(f"{theirs}.ffn_norm.weight", bf16(f"{ours}.post_attention_layernorm.weight"))
        for name, known_as in (softmax if kind else lightning).items():
            add(f"{theirs}.{known_as}.weight", bf16(f"{ours}.self_attn.{name}.weight"))
        moe = f"{ours}.block_sparse_moe"
        add(f"{theirs}.ffn_gate_inp.weight", bf16(f"{moe}.gate.weight"), wide=True)
        for name, known_as in dict(w1="ffn_gate_exps", w2="ffn_down_exps", w3="ffn_up_exps").items():
            experts = range(twin["num_local_experts"])
            add(f"{theirs}.{known_as}.weight", numpy.stack([bf16(f"{moe}.experts.{e}.{name}.weight") for e in experts]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(out)
    return out
