"""Models of transformers behind a fused head: loading, LoRA, dropout, packing of rows."""
