"""The tolerances of all comparisons of floating-point results, by op and dtype of its input.

Each entry holds the `rtol` and `atol` of `torch.testing.assert_close`. Whatever is not listed is compared exactly.
"""

from __future__ import annotations

import torch

TOLERANCES: dict[tuple[str, torch.dtype], dict[str, float]] = {
    # The sum of exponentials is float32 for either dtype; its relative error is absolute in the logarithm.
    ("select_candidates.logsumexp", torch.float32): {"rtol": 3e-7, "atol": 2e-6},
    ("select_candidates.logsumexp", torch.bfloat16): {"rtol": 3e-7, "atol": 2e-6},
    # Difference of two numbers of the size of the logits, up to 32 in the tests: a few units in their last place.
    ("adjust_and_pick.logprob", torch.float32): {"rtol": 1e-6, "atol": 8e-6},
    # Unit-variance inputs; the error of a score, about 1e-6, is relative in its weight.
    ("branch_attention", torch.float32): {"rtol": 1e-5, "atol": 3e-6},
    # Float32 inside, then one rounding to 8 bits of mantissa that may fall to either side.
    ("branch_attention", torch.bfloat16): {"rtol": 2**-7, "atol": 1e-5},
    # Matrix units take softmax weights rounded to the dtype: an error of 2**-9 (2**-12) of the values they weigh.
    ("kernels.branch_attention", torch.float32): {"rtol": 1e-5, "atol": 3e-6},
    ("kernels.branch_attention", torch.float16): {"rtol": 2**-9, "atol": 2e-3},
    ("kernels.branch_attention", torch.bfloat16): {"rtol": 2**-7, "atol": 1.6e-2},
    # Float32 inside, results of unit variance, one rounding at the end; the interpreter of Triton cuts off bfloat16.
    ("kernels.rounding", torch.float32): {"rtol": 1e-5, "atol": 1e-5},
    ("kernels.rounding", torch.float16): {"rtol": 2**-10, "atol": 1e-5},
    ("kernels.rounding", torch.bfloat16): {"rtol": 2**-7, "atol": 1e-5},
    # Either rounds what it multiplies to the dtype, before or after the division by the root mean square: 2**-9
    # (2**-12) of products that sum to unit variance, and twice that where the interpreter cuts off.
    ("kernels.normed_linear", torch.float32): {"rtol": 1e-5, "atol": 1e-5},
    ("kernels.normed_linear", torch.float16): {"rtol": 2**-9, "atol": 2e-3},
    ("kernels.normed_linear", torch.bfloat16): {"rtol": 2**-6, "atol": 3e-2},
    # Unit-variance sums of up to 130 products, in float32 for either dtype.
    ("linear", torch.float32): {"rtol": 1e-5, "atol": 2e-5},
    ("linear", torch.bfloat16): {"rtol": 1e-5, "atol": 2e-5},
    # Logits up to about 30 of networks of three layers, summed in two orders.
    ("decoder.logits", torch.float32): {"rtol": 1e-5, "atol": 2e-4},
    # Values up to about 4: the reference rounds to 8 bits of mantissa after every op of its three layers, the compiled
    # decoder where a linear layer reads or a cache is written. Either is this far from float32.
    ("decoder.hidden_states", torch.bfloat16): {"rtol": 0.0, "atol": 0.125},
    ("decoder.hidden_states", torch.float16): {"rtol": 0.0, "atol": 0.03},
    # Two logarithms per draw, each within one unit in the last place.
    ("gumbel", torch.float32): {"rtol": 1e-6, "atol": 1e-6},
    # Networks in float64 whose norms and rotary angles stay float32: a sum in another order may round to either side.
    ("packing", torch.float64): {"rtol": 1e-5, "atol": 1e-6},
    # Sums of terms up to about 50, of hidden states that are summed in another order with a cache than without.
    ("verifier.score", torch.float32): {"rtol": 1e-5, "atol": 5e-4},
}
