"""Packed linear layers: values against torch, and the same bits whatever rows, threads and arrangement."""

from __future__ import annotations

import pytest
import torch
from torch.utils.dlpack import from_dlpack, to_dlpack

from llm2_fast import ops
from llm2_fast.models.quantization import Quantization
from tolerances import TOLERANCES

extension = ops.cpu_extension()
pytestmark = pytest.mark.skipif(extension is None, reason=str(ops.cpu_extension_problem()))

ISAS = extension.cpu_isas() if extension else []
DTYPES = (torch.float32, torch.bfloat16)
# (out_features, in_features): whole panels, tails of every kind, one of each.
SHAPES = [(64, 32), (33, 7), (1, 1), (17, 48), (100, 65), (5, 130)]
PER_CHANNEL = 1 << 40
GROUP_SIZES = {"plain": 0, "channel": PER_CHANNEL, "group6": 6, "group32": 32}  # 6: none of the shapes' divides


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pack(weights, biases=None, isa=None, interleaved=False, num_threads=1, group_size=0):
    biases = biases or [None] * len(weights)
    capsules = [None if bias is None else to_dlpack(bias) for bias in biases]
    weights = [to_dlpack(w) for w in weights]
    return extension.PackedLinear(weights, capsules, interleaved, num_threads, isa, group_size)


def kept(weight, group_size):
    """What the packed layer keeps of `weight`, float32."""
    return weight.float() if group_size == 0 else Quantization(group_size).round_trip(weight.float())


def unpack(packed, out_features, in_features):
    rows = torch.full((out_features, in_features), float("nan"))
    for index, row in enumerate(rows):
        packed.unpack_row(index, to_dlpack(row))
    return rows


def multiply(packed, x, out_features, num_threads=1):
    output = torch.full((x.shape[0], out_features), float("nan"))
    packed.multiply(to_dlpack(x), to_dlpack(output), num_threads)
    return output


@pytest.mark.parametrize("group_size", GROUP_SIZES.values(), ids=GROUP_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch(shape, isa, dtype, group_size):
    weight, bias = random(*shape, dtype=dtype), random(shape[0], seed=1)
    packed = pack([weight], [bias], isa, group_size=group_size)
    assert packed.isa == isa
    assert (packed.group_size > 0) == (group_size > 0)
    assert torch.equal(unpack(packed, *shape), kept(weight, group_size))
    for rows in (1, 2, 5, 12, 13, 29, 70):
        x = random(rows, shape[1], dtype=dtype, seed=rows)
        expected = (x.double() @ kept(weight, group_size).double().T + bias.double()).float()
        torch.testing.assert_close(multiply(packed, x, shape[0]), expected, **TOLERANCES["linear", dtype])


@pytest.mark.parametrize("group_size", GROUP_SIZES.values(), ids=GROUP_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_bits_depend_neither_on_rows_nor_on_threads(isa, dtype, group_size):
    weight, x = random(150, 70, dtype=dtype), random(40, 70, dtype=dtype, seed=1)
    expected = multiply(pack([weight], isa=isa, group_size=group_size), x, 150)
    for num_threads in (1, 2, 3):
        packed = pack([weight], isa=isa, num_threads=num_threads, group_size=group_size)
        for rows in (1, 2, 7, 12, 40):
            for first in range(0, 40 - rows + 1, max(1, rows - 1)):
                part = multiply(packed, x[first : first + rows], 150, num_threads)
                assert torch.equal(part, expected[first : first + rows])


@pytest.mark.parametrize("group_size", GROUP_SIZES.values(), ids=GROUP_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_as_many_rows_as_a_pass_over_prompts_and_more(isa, dtype, group_size):
    weight, x = random(33, 40, dtype=dtype), random(1024, 40, dtype=dtype, seed=1)
    packed = pack([weight], isa=isa, group_size=group_size)
    output = multiply(packed, x, 33)
    expected = (x.double() @ kept(weight, group_size).double().T).float()
    torch.testing.assert_close(output, expected, **TOLERANCES["linear", dtype])
    for rows in (256, 257, 1024):
        assert torch.equal(multiply(packed, x[:rows], 33, num_threads=3), output[:rows])
    for row in (0, 255, 256, 1023):
        assert torch.equal(multiply(packed, x[row : row + 1], 33), output[row : row + 1])


@pytest.mark.parametrize("group_size", GROUP_SIZES.values(), ids=GROUP_SIZES)
def test_weights_with_the_same_input_are_stacked(group_size):
    weights, biases = [random(n, 24, seed=n) for n in (3, 40, 17)], [random(3), None, random(17)]
    packed = pack(weights, biases, group_size=group_size)
    x = random(4, 24)
    zeros = torch.zeros(40)
    bias = torch.cat([biases[0], zeros, biases[2]])
    together = multiply(pack([torch.cat(weights)], [bias], group_size=group_size), x, 60)
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


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("group_size", [PER_CHANNEL, 6])
def test_nan_and_infinity_stay_in_their_row_with_int8_weights(isa, group_size):
    packed, x = pack([random(40, 16)], isa=isa, group_size=group_size), random(4, 16)
    clean = multiply(packed, x, 40)
    x[1, 3], x[2, 9] = float("nan"), float("inf")
    dirty = multiply(packed, x, 40)
    assert dirty[1].isnan().all()
    assert not dirty[2].isfinite().any()
    assert torch.equal(dirty[[0, 3]], clean[[0, 3]])


SUBNORMAL = 2.0**-149
ROWS_TO_QUANTIZE = {
    "zeros": [0.0, -0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    "ties": [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -126.5],
    "one group of zeros": [1.0, -2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0],
    "huge": [3.4e38, -3.4e38, 1.7e38, 1e38, -1e37, 1e30, 1.0, -1.0],
    "scale below the normal numbers": [190 * SUBNORMAL, -190 * SUBNORMAL, 64 * SUBNORMAL, SUBNORMAL, 0, 0, 0, 0],
    "no scale is small enough": [50 * SUBNORMAL, -50 * SUBNORMAL, SUBNORMAL, 0, 0, 0, 0, 0],
    "one large": [1000.0, 1.0, 3.0, 3.9370079, 3.937008, -11.811023, 0.1, 1e-30],
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("group_size", [PER_CHANNEL, 4])
def test_extreme_weights_are_quantized_as_in_torch(isa, group_size):
    weight = torch.tensor(list(ROWS_TO_QUANTIZE.values()))
    values, scales = Quantization(group_size).quantize(weight)
    assert values.abs().max() == 127
    packed = pack([weight], isa=isa, group_size=group_size)
    repeated = scales.repeat_interleave(min(group_size, 8), dim=1)
    assert torch.equal(unpack(packed, *weight.shape), values * repeated)
    # Where 127 is in a group the scale is 1, so these are the values themselves.
    assert unpack(packed, *weight.shape)[1, :4].tolist() == [127.0, 0.0, 2.0, 2.0]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_cannot_become_int8(isa, bad):
    weight = random(40, 16)
    weight[37, 11] = bad
    for group_size in (PER_CHANNEL, 6):
        with pytest.raises(ValueError, match="weights: expected finite numbers, got NaN or infinity"):
            pack([weight], isa=isa, group_size=group_size)


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
        (([random(4, 3)], None, None, False, 1, -2), "group_size: expected >= 0, got -2"),
        (([random(4, 8)], None, None, False, 1, 7), "group_size: expected an even number or at least in_features"),
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
    with pytest.raises(ValueError, match=r"row: expected indices in \[0, 4\), got 4"):
        packed.unpack_row(4, to_dlpack(torch.empty(3)))
    with pytest.raises(ValueError, match="linear: expected stacked weights"):
        pack([random(4, 3), random(4, 3)], interleaved=True).unpack_row(0, to_dlpack(torch.empty(3)))


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
@pytest.mark.parametrize("group_size", [0, 8, 19])
@pytest.mark.parametrize("isa", ISAS)
def test_a_layer_over_the_buffers_of_another_is_the_same(isa, group_size, dtype, interleaved):
    weights = [random(37, 19, dtype=dtype, seed=seed) for seed in (1, 2)]
    for biases in (None, [random(37, seed=3), None]):
        packed = pack(weights, biases, isa, interleaved, group_size=group_size)
        buffers = {name: aligned(tensor) for name, tensor in buffers_of(packed).items()}
        expected_names = {"weights", *(["scales"] if group_size else []), *(["bias"] if biases else [])}
        assert buffers.keys() == expected_names
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


def buffers(linear):
    return {name: from_dlpack(capsule) for name, capsule in linear.buffers().items()}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [0, 8])
@pytest.mark.parametrize("interleaved", [False, True])
def test_pieces_make_the_whole(isa, dtype, group_size, interleaved):
    weights = [random(150, 19, dtype=dtype, seed=seed) for seed in range(1 + interleaved)]
    whole = pack(weights, interleaved=interleaved, isa=isa, group_size=group_size)
    name = str(dtype).removeprefix("torch.")
    pieces = extension.PackedLinear.unpacked(name, 19, 150 * len(weights), interleaved, isa, group_size)
    step = 2 * pieces.piece_rows
    for first in reversed(range(0, 150, step)):  # in any order
        pieces.pack_rows(first, [to_dlpack(weight[first : first + step]) for weight in weights], 2)
    expected = buffers(whole)
    assert buffers(pieces).keys() == expected.keys()
    assert all(torch.equal(actual, expected[name]) for name, actual in buffers(pieces).items())
    assert pieces.layout == whole.layout


@pytest.mark.parametrize(
    ("first", "weights", "message"),
    [
        (1, [torch.ones(64, 5)], "rows: expected those from one multiple of .* got 1 to 65"),
        (-64, [torch.ones(64, 5)], "rows: expected"),
        (64, [torch.ones(65, 5)], "rows: expected .* got 64 to 129"),
        (0, [torch.ones(7, 5)], "rows: expected .* got 0 to 7"),
        (0, [torch.ones(64, 6)], "weights: expected shape"),
        (0, [torch.ones(64, 5, dtype=torch.bfloat16)], "weights: expected"),
        (0, [torch.ones(64, 5)] * 2, "number of weights: expected 1, got 2"),
    ],
)
def test_pieces_that_do_not_fit_are_refused(first, weights, message):
    linear = extension.PackedLinear.unpacked("float32", 5, 128, False)
    with pytest.raises(ValueError, match=message):
        linear.pack_rows(first, [to_dlpack(weight) for weight in weights], 1)


def test_buffers_of_others_are_not_written_to():
    whole = pack([torch.ones(64, 5)])
    mapped = extension.PackedLinear.from_buffers(whole.buffers(), **whole.layout)
    with pytest.raises(ValueError, match="linear: expected one made by unpacked"):
        mapped.pack_rows(0, [to_dlpack(torch.ones(64, 5))], 1)
