"""The W2A8 product in a PyTorch module of your own; needs an NVIDIA GPU, PyTorch, and the extra cuda13 or cuda12.

python examples/kernel_in_torch.py
"""

import torch

import bitnet_numba as bn


class TernaryLinear(torch.nn.Module):
    """y = x @ (t * scale).T with ternary t, of float weights [N, K]: two bits a weight on the GPU; for inference."""

    def __init__(self, weights: torch.Tensor):
        super().__init__()
        ternary, scale = bn.quantize.ternarize(weights.float().cpu().numpy())
        self.linear = bn.pack_linear(ternary, scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [..., K] -> float32 [..., N]; each token of x is quantised to int8 by its own absmax."""
        out = torch.empty(*x.shape[:-1], self.linear.N, device="cuda")
        return bn.w2a8_linear(x, self.linear, out=out, stream=torch.cuda.current_stream())


weights = torch.randn(3840, 2560)
module = TernaryLinear(weights)
x = torch.randn(8, 2560, device="cuda")
y = module(x)

ternary, scale = bn.quantize.ternarize(weights.numpy())
q, s = bn.quantize.quantize_activations(x.cpu().numpy())
products = q.astype("int32") @ ternary.T.astype("int32")  # exact
expected = products.astype("float32") * scale / s
difference = (y.cpu() - torch.from_numpy(expected)).abs().max().item()
print(f"{tuple(x.shape)} -> {tuple(y.shape)}, largest difference from NumPy: {difference:.1e}")
