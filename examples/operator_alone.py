"""The attention operator by itself: what it attends to, its gradients, and what it costs over the length.

python examples/operator_alone.py
"""

import time

import torch

from fibattn import Pattern, attend

pattern = Pattern.fibonacci(window=12, alpha=1.5)
print(f"a token attends to itself, the {pattern.window} before it, and those {pattern.offsets} before it")

torch.manual_seed(0)
q = torch.randn(1, 300, 4, 32, requires_grad=True)  # batch, tokens, query heads, head size
k, v = (torch.randn(1, 300, 2, 32, requires_grad=True) for _ in range(2))  # half as many key and value heads
out = attend(q, k, v, pattern)

# The same through a mask, which costs the square of the length.
distance = torch.arange(300)[:, None] - torch.arange(300)
mask = torch.isin(distance, torch.tensor(sorted(pattern.distances)))
same = torch.nn.functional.scaled_dot_product_attention(
    q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, enable_gqa=True
).transpose(1, 2)
print(f"PyTorch's attention under that mask differs by {(out - same).abs().max():.0e}")

# The last token's gradient reaches exactly the keys that it attends to.
(gradient,) = torch.autograd.grad(out[0, -1].sum(), k)
reached = gradient[0].abs().sum(dim=(1, 2)).nonzero().flatten()
print("distances that the last token's gradient reaches:", sorted((299 - reached).tolist()))

for length in (2_000, 4_000, 8_000, 16_000):
    q, k, v = (torch.randn(1, length, heads, 32) for heads in (4, 2, 2))
    began = time.perf_counter()
    attend(q, k, v, pattern)
    print(f"{length:6,} tokens: {1000 * (time.perf_counter() - began):5.1f} ms")
