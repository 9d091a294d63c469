"""Decoder-only and encoder-decoder language models of the published list."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.zoo.base import HEADS, HIDDEN, LAYERS, VOCAB, Entry
from tests.zoo.hf import SMALL_TEXT, builder, decoder, encoder_decoder_inputs

EXPERTS: dict[str, Any] = {"experts_implementation": "batched_mm"}
"""Route by a batched matrix product: the default eager loop over the experts breaks the graph at each layer."""

GPT2_NAMES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BART_NAMES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": 3,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 2 * HIDDEN,
    "decoder_ffn_dim": 2 * HIDDEN,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def two_a_layer(model: nn.Module) -> int:
    """Attention and feed-forward: two sites for each decoder layer."""
    config: Any = model.config
    return 2 * int(config.num_hidden_layers)


def one_a_layer(model: nn.Module) -> int:
    """Parallel attention and feed-forward (or a single mixer): one site for each layer."""
    config: Any = model.config
    return int(config.num_hidden_layers)


def bart_sites(model: nn.Module) -> int:
    """Encoder layer: attention, feed-forward. Decoder layer: attention, cross-attention, feed-forward."""
    config: Any = model.config
    return 2 * int(config.encoder_layers) + 3 * int(config.decoder_layers)


def t5_sites(model: nn.Module) -> int:
    """As BART, under the names of T5."""
    config: Any = model.config
    return 2 * int(config.num_layers) + 3 * int(config.num_decoder_layers)


TWO = "2 x num_hidden_layers (attention, feed-forward)"
PARALLEL = "1 x num_hidden_layers (attention and feed-forward are added to the stream together)"
CROSS = "2 x encoder layers + 3 x decoder layers (attention, cross-attention, feed-forward)"


def usual(name: str, model_type: str, notes: str = "", **settings: Any) -> Entry:
    """A decoder with the usual configuration names and two sites a layer."""
    return Entry(name, "decoder", decoder(model_type, **settings), two_a_layer, TWO, notes=notes)


ENTRIES: list[Entry] = [
    usual("llama", "llama"),
    usual("qwen3", "qwen3", head_dim=16),
    usual(
        "qwen3-moe",
        "qwen3_moe",
        "experts by batched_mm; the router lies in the branch",
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        build=EXPERTS,
    ),
    usual("mixtral", "mixtral", "experts by batched_mm", num_local_experts=4, build=EXPERTS),
    usual(
        "gemma3",
        "gemma3_text",
        "sandwich norms: the second norm of a branch is applied before the add; one local and one global layer",
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    usual("phi3", "phi3", "residual dropout on the branch"),
    Entry("gpt2", "decoder", builder("gpt2", **GPT2_NAMES), two_a_layer, TWO, notes="the position add is no site"),
    Entry(
        "gpt-neox",
        "decoder",
        decoder("gpt_neox"),
        one_a_layer,
        PARALLEL,
        notes="mlp + attn + x with two norms (use_parallel_residual=True)",
    ),
    usual("gpt-neox-serial", "gpt_neox", "use_parallel_residual=False", use_parallel_residual=False),
    Entry(
        "gptj", "decoder", builder("gptj", rotary_dim=8, **GPT2_NAMES), one_a_layer, PARALLEL, notes="one shared norm"
    ),
    Entry(
        "falcon",
        "decoder",
        builder(
            "falcon", **{k: v for k, v in SMALL_TEXT.items() if k not in ("intermediate_size", "num_key_value_heads")}
        ),
        one_a_layer,
        PARALLEL,
        notes="mlp_output += attention_output, in place, then one add",
    ),
    usual("opt", "opt", "do_layer_norm_before=True", ffn_dim=2 * HIDDEN, word_embed_proj_dim=HIDDEN),
    Entry(
        "bloom",
        "decoder",
        builder(
            "bloom", vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS, bos_token_id=1, eos_token_id=2
        ),
        two_a_layer,
        TWO,
        notes="dropout_add(branch, residual); norm right after the embedding",
    ),
    Entry(
        "cohere2", "decoder", decoder("cohere2", sliding_window=8), one_a_layer, PARALLEL, notes="residual + attn + mlp"
    ),
    usual(
        "granite", "granite", "branch scaled by residual_multiplier", residual_multiplier=0.22, embedding_multiplier=2.0
    ),
    usual(
        "deepseek-v3",
        "deepseek_v3",
        "one dense layer, two expert layers; the shared expert's add lies inside the branch",
        num_hidden_layers=3,
        num_key_value_heads=HEADS,
        moe_intermediate_size=32,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        num_mtp_layers=0,
        build=EXPERTS,
    ),
    usual("qwen2", "qwen2"),
    usual("mistral", "mistral", sliding_window=8),
    usual("gemma2", "gemma2", "sandwich norms and soft caps", head_dim=16, query_pre_attn_scalar=16, sliding_window=8),
    usual("olmo2", "olmo2", "x + norm(branch(x)): the only norm of a branch is at its end"),
    usual("smollm3", "smollm3"),
    usual("starcoder2", "starcoder2"),
    Entry(
        "t5",
        "encoder-decoder",
        builder(
            "t5",
            "AutoModelForSeq2SeqLM",
            encoder_decoder_inputs,
            vocab_size=VOCAB,
            d_model=HIDDEN,
            d_kv=16,
            d_ff=2 * HIDDEN,
            num_layers=LAYERS,
            num_decoder_layers=3,
            num_heads=HEADS,
            decoder_start_token_id=0,
        ),
        t5_sites,
        CROSS,
        notes="two chains; shared embedding; relative position bias computed in the first layer",
    ),
    Entry(
        "mbart",
        "encoder-decoder",
        builder("mbart", "AutoModelForSeq2SeqLM", encoder_decoder_inputs, **BART_NAMES),
        bart_sites,
        CROSS,
        notes="the pre-norm BART",
    ),
    Entry(
        "bart",
        "encoder-decoder",
        builder("bart", "AutoModelForSeq2SeqLM", encoder_decoder_inputs, **BART_NAMES),
        bart_sites,
        CROSS,
        status="refused",
        reason="post-norm",
        options={"post_norm": "per_stream"},
        notes="layer norm on the sum, in encoder and decoder",
    ),
    Entry(
        "mamba2",
        "ssm",
        builder(
            "mamba2",
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            expand=2,
            num_heads=8,
            head_dim=16,
            state_size=16,
            n_groups=2,
            chunk_size=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        one_a_layer,
        "1 x num_hidden_layers (the mixer)",
        notes="residual kept in float32; y + D * x inside the mixer is no site",
    ),
]
