"""How a backbone computes, which decides nothing that it is: the precision, and what is recomputed."""

PRECISIONS = ("float32", "bfloat16")
REMAT = ("none", "full", "dots")  # rows of `nn.stack.REMAT`, which imports Flax
