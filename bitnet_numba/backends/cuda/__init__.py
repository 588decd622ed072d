"""The CUDA backend: weights, state and buffers in device memory, and the launches of a forward pass over them."""
