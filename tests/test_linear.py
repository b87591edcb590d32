"""Packed linear layers: values against torch, and the same bits whatever rows, threads and arrangement."""

from __future__ import annotations

import pytest
import torch
from torch.utils.dlpack import from_dlpack, to_dlpack

from llm2_fast import ops
from tolerances import TOLERANCES

extension = ops.cpu_extension()
pytestmark = pytest.mark.skipif(extension is None, reason=str(ops.cpu_extension_problem()))

ISAS = extension.cpu_isas() if extension else []
DTYPES = (torch.float32, torch.bfloat16)
# (out_features, in_features): whole panels, tails of every kind, one of each.
SHAPES = [(64, 32), (33, 7), (1, 1), (17, 48), (100, 65), (5, 130)]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pack(weights, biases=None, isa=None, interleaved=False, num_threads=1):
    biases = biases or [None] * len(weights)
    capsules = [None if bias is None else to_dlpack(bias) for bias in biases]
    return extension.PackedLinear([to_dlpack(w) for w in weights], capsules, interleaved, num_threads, isa)


def multiply(packed, x, out_features, num_threads=1):
    output = torch.full((x.shape[0], out_features), float("nan"))
    packed.multiply(to_dlpack(x), to_dlpack(output), num_threads)
    return output


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch(shape, isa, dtype):
    weight, bias = random(*shape, dtype=dtype), random(shape[0], seed=1)
    packed = pack([weight], [bias], isa)
    assert packed.isa == isa
    for rows in (1, 2, 5, 12, 13, 29):
        x = random(rows, shape[1], dtype=dtype, seed=rows)
        expected = (x.double() @ weight.double().T + bias.double()).float()
        torch.testing.assert_close(multiply(packed, x, shape[0]), expected, **TOLERANCES["linear", dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_bits_depend_neither_on_rows_nor_on_threads(isa, dtype):
    weight, x = random(150, 70, dtype=dtype), random(40, 70, dtype=dtype, seed=1)
    expected = multiply(pack([weight], isa=isa), x, 150)
    for num_threads in (1, 2, 3):
        packed = pack([weight], isa=isa, num_threads=num_threads)
        for rows in (1, 2, 7, 12, 40):
            for first in range(0, 40 - rows + 1, max(1, rows - 1)):
                part = multiply(packed, x[first : first + rows], 150, num_threads)
                assert torch.equal(part, expected[first : first + rows])


def test_weights_with_the_same_input_are_stacked():
    weights, biases = [random(n, 24, seed=n) for n in (3, 40, 17)], [random(3), None, random(17)]
    packed = pack(weights, biases)
    x = random(4, 24)
    zeros = torch.zeros(40)
    bias = torch.cat([biases[0], zeros, biases[2]])
    together = multiply(pack([torch.cat(weights)], [bias]), x, 60)
    assert torch.equal(multiply(packed, x, 60), together)


@pytest.mark.parametrize("isa", ISAS)
def test_nan_and_infinity_stay_in_their_row_and_feature(isa):
    weight, x = random(40, 16), random(3, 16)
    clean = multiply(pack([weight], isa=isa), x, 40)
    x[1, 3] = float("nan")
    weight[7, 2] = float("inf")
    dirty = multiply(pack([weight], isa=isa), x, 40)
    assert dirty[1].isnan().all()
    assert dirty[[0, 2], 7].isinf().all()
    others = [feature for feature in range(40) if feature != 7]
    assert torch.equal(dirty[[0, 2]][:, others], clean[[0, 2]][:, others])


def test_empty_input_gives_empty_output():
    assert multiply(pack([random(5, 4)]), random(0, 4), 5).shape == (0, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([random(4, 3), random(4, 2)],), "in_features of weights: expected 3, got 2"),
        (([random(4, 3), random(4, 3, dtype=torch.bfloat16)],), "weights: expected float32, got bfloat16"),
        (([random(4, 3)], [random(5)]), r"biases: expected shape \[4\], got shape \[5\]"),
        (([random(4, 3).half()],), "weights: expected float32 or bfloat16 on the CPU, got float16"),
        (([],), "weights: expected one or more"),
        (([random(4, 3), random(5, 3)], None, None, True), "out_features of weights: expected 4, got 5"),
        (([random(0, 3)],), "out_features of weights: expected >= 1, got 0"),
        (([random(4, 3)], None, "sse9"), "isa: expected a tier"),
        (([random(4, 3)], None, None, False, 0), "num_threads: expected >= 1, got 0"),
    ],
)
def test_bad_weights_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        pack(*arguments)


def test_bad_inputs_are_refused_by_name():
    packed = pack([random(4, 3)])
    with pytest.raises(ValueError, match="input: expected shape"):
        multiply(packed, random(2, 4), 4)
    with pytest.raises(ValueError, match="output: expected shape"):
        multiply(packed, random(2, 3), 5)
    with pytest.raises(ValueError, match="input: expected float32 on the CPU, got bfloat16"):
        multiply(packed, random(2, 3, dtype=torch.bfloat16), 4)


# --- Buffers -------------------------------------------------------------------------------------------------------


def buffers_of(packed):
    return {name: from_dlpack(capsule) for name, capsule in packed.buffers().items()}


def aligned(tensor, offset=0):
    """A copy `offset` elements behind a multiple of 64 bytes."""
    storage = tensor.new_zeros(len(tensor) + 128)
    first = -storage.data_ptr() % 64 // tensor.element_size() + offset
    storage[first : first + len(tensor)] = tensor
    return storage[first : first + len(tensor)]


def rebuild(buffers, **layout):
    return extension.PackedLinear.from_buffers({name: to_dlpack(t) for name, t in buffers.items()}, **layout)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_a_layer_over_the_buffers_of_another_is_the_same(isa, dtype, interleaved):
    weights = [random(37, 19, dtype=dtype, seed=seed) for seed in (1, 2)]
    for biases in (None, [random(37, seed=3), None]):
        packed = pack(weights, biases, isa, interleaved)
        buffers = {name: aligned(tensor) for name, tensor in buffers_of(packed).items()}
        assert buffers.keys() == ({"weights"} if biases is None else {"weights", "bias"})
        layout = packed.layout
        again = rebuild(buffers, **layout)
        assert again.layout == layout
        assert buffers_of(again)["weights"].data_ptr() == buffers["weights"].data_ptr()
        for name, tensor in buffers_of(packed).items():
            assert torch.equal(buffers_of(again)[name], tensor)
        if not interleaved:
            x = random(3, 19, dtype=dtype, seed=4)
            expected = multiply(packed, x, 74)
            del buffers, packed  # the layer keeps its weights alive
            assert torch.equal(multiply(again, x, 74), expected)


def test_buffers_outlive_their_layer():
    packed = pack([torch.ones(64, 32)])
    buffers = buffers_of(packed)
    del packed
    assert torch.equal(buffers["weights"], torch.ones(64 * 32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b, layout: b.pop("weights"), "buffers: expected weights and perhaps bias"),
        (lambda b, layout: b.update(scales=b["bias"]), "buffers: expected weights and perhaps bias, got 3"),
        (lambda b, layout: b.update(weights=b["weights"][:-1]), "expected weights of .* got .* float32 elements"),
        (lambda b, layout: b.update(bias=b["bias"].bfloat16()), "expected bias of .* bfloat16 elements"),
        (lambda b, layout: b.update(weights=aligned(b["weights"], 1)), "weights at a multiple of 64 bytes"),
        (lambda b, layout: layout.update(in_features=99), "expected weights of"),
        (lambda b, layout: layout.update(out_features=0), "out_features: expected >= 1, got 0"),
        (lambda b, layout: layout.update(dtype="int4"), "dtype: expected float32 or bfloat16, got int4"),
        (lambda b, layout: layout.update(isa="sse9"), "isa: expected a tier"),
        (lambda b, layout: layout.update(panel_shape=[1, 1, 1]), "panel_shape: expected that of this build"),
        (lambda b, layout: layout.update(interleaved=True, out_features=33), "out_features % 2: expected 0, got 1"),
    ],
)
def test_wrong_buffers_are_refused_by_name(change, message):
    packed = pack([random(40, 19)], [random(40)])
    buffers = {name: aligned(tensor) for name, tensor in buffers_of(packed).items()}
    layout = packed.layout
    change(buffers, layout)
    with pytest.raises(ValueError, match=message):
        rebuild(buffers, **layout)
