"""What the dims of parameters are called, for `parallel.shardings`: one table, as networks share their layers.

A row holds for the last dims of a parameter; a stack's layers and a convolution's taps are never divided. What is no
kernel (biases, scales, positions, embeddings) is small and stays whole.
"""

from ldm_jax.parallel.rules import REPLICATED

TABLE = (
    (r"(to_q|to_k|to_v)/kernel", ("embed", "heads")),
    (r"to_out/kernel", ("heads", "embed")),
    (r"(linear_1|expand)/kernel", ("embed", "ffn")),
    (r"(linear_2|contract)/kernel", ("ffn", "embed")),
    (r"kernel", ("in", "out")),
    (r".*", REPLICATED),
)
