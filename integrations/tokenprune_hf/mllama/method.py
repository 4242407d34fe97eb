"""What `tokenprune methods` lists about trimmed cross-attention. It imports no engine."""

from __future__ import annotations

from tokenprune.registry import Method

METHOD = Method(
    name="trimmed-attention",
    kind="cross-attention",
    summary="attention of the text to vision tokens, by head (Llama-3.2-Vision only)",
    paper="Trimmed Llama, arXiv 2504.00557",
    call="tokenprune_hf.trim_cross_attention(model, keep)",
    options={"queries": "sum", "first_layer": "full"},
)
