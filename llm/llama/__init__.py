"""The engine for checkpoints of the Llama architecture: own forward pass, paged KV cache, continuous batching."""
