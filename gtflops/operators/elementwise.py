"""Prices of operators that cost a number of FLOPs an element: arithmetic, activations, interpolation."""

from math import ceil, prod

from gtflops.operators.call import Call, TensorType
from gtflops.operators.cost import (
    Entry,
    Flops,
    FlopsByOutput,
    Formula,
    Kind,
    entry,
    integers,
    per_input,
    per_output,
    per_value,
)


def gelu(call: Call) -> Flops:
    """0.5 x (1 + erf(x / sqrt 2)): 5; with ``tanh``: 0.5 x (1 + tanh(a (x + b x^3))): 9."""
    tanh = call.argument(1, "approximate", "none") == "tanh"
    return Flops(other=(9 if tanh else 5) * call.output.numel)


def gelu_backward(call: Call) -> Flops:
    """g (cdf + x pdf): cdf 4, pdf (square, scale, exp, scale) 4, combine 3; with ``tanh`` 19 in the same way."""
    tanh = call.argument(2, "approximate", "none") == "tanh"
    return Flops(other=(19 if tanh else 11) * call.output.numel)


def for_each(flops: int) -> Formula:
    """``flops`` for each element of each tensor of a list."""

    def formula(call: Call) -> Flops:
        tensors = call.argument(0, "self")
        if not isinstance(tensors, tuple):
            raise TypeError(f"{call.op}: its first argument is {tensors!r}, expected a list of tensors")
        sizes = (item.numel for item in tensors if isinstance(item, TensorType) and item.is_floating)
        return Flops(other=flops * sum(sizes))

    return formula


# --- interpolation ---------------------------------------------------------------------------------------------


def interpolation(taps: int) -> Formula:
    """A weighted sum of ``taps`` values for each that comes out: a product each and one addition less. The weights,
    which are the same for every channel, are not counted."""
    return per_output(2 * taps - 1)


def antialiased(taps: int) -> Formula:
    """Along the width, then along the height, each a weighted sum over ``taps`` values, more where the image shrinks:
    ceil(taps max(1, in / out))."""

    def formula(call: Call) -> Flops:
        *planes, height, width = call.shape(0)
        return _antialiased(prod(planes), (height, width), call.output.shape[-2:], taps, less=1)

    return formula


def antialiased_backward(taps: int) -> Formula:
    """The transposed sums: a product and an addition for each value and weight."""

    def formula(call: Call) -> Flops:
        *planes, height, width = integers(call, 2, "input_size")
        return _antialiased(prod(planes), (height, width), call.shape(0)[-2:], taps, less=0)

    return formula


def _antialiased(planes: int, inner: tuple[int, int], outer: tuple[int, ...], taps: int, less: int) -> Flops:
    by_height, by_width = (
        2 * ceil(taps * max(size, result) / result) - less if result else 0
        for size, result in zip(inner, outer, strict=True)
    )
    return Flops(other=planes * outer[1] * (inner[0] * by_width + outer[0] * by_height))


# Of a sampled point and of a channel at it, by interpolation mode (bilinear, nearest, bicubic).
# Position: 2 a coordinate. Bilinear: the fractions and their complements, 2 a coordinate, and a product for each corner
# (two in three dimensions). Nearest: a rounding a coordinate. Bicubic: a fraction a coordinate and four cubics of 5.
_POINT = {2: (2 * 2 + 2 * 2 + 4, 2 * 2 + 2, 2 * 2 + 2 + 2 * 4 * 5), 3: (3 * 2 + 3 * 2 + 2 * 8, 3 * 2 + 3)}
_TAPS = {2: (4, 1, 16), 3: (8, 1)}


def _mode(call: Call, position: int) -> int:
    mode = call.argument(position, "interpolation_mode")
    if not isinstance(mode, int):
        raise TypeError(f"{call.op}: argument interpolation_mode is {mode!r}, expected an integer")
    return mode


def grid_sampler(rank: int) -> Formula:
    """For each point its position and weights, once; for each channel a weighted sum of the values around."""

    def formula(call: Call) -> Flops:
        mode = _mode(call, 2)
        points = prod(call.shape(1)[:-1])
        taps = _TAPS[rank][mode]
        return Flops(other=points * _POINT[rank][mode] + call.output.numel * (2 * taps - 1))

    return formula


def grid_sampler_backward(rank: int) -> Formula:
    """Positions and weights are shared. The input's gradient adds a product to each value around; the grid's adds,
    for each value around and each coordinate, value x gradient x derivative of the weight (2 and an addition), and is
    scaled; the nearest value does not depend on the grid."""

    def formula(call: Call) -> FlopsByOutput:
        mode = _mode(call, 3)
        points = prod(call.shape(2)[:-1])
        terms = prod(call.shape(0)) * _TAPS[rank][mode]
        of_grid = 0 if mode == 1 else rank * (3 * terms + points)
        return FlopsByOutput(Flops(other=points * _POINT[rank][mode]), (Flops(other=2 * terms), Flops(other=of_grid)))

    return formula


# --- the table -------------------------------------------------------------------------------------------------

_ONE = """neg pow sqrt rsqrt exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan sinh cosh tanh asinh acosh
atanh sigmoid erf erfc erfinv lgamma digamma polygamma i0 special_i0e special_i1 special_i1e special_ndtri
special_erfcx sign sgn floor ceil round trunc frac remainder fmod floor_divide maximum minimum fmax fmin clamp clamp_min
clamp_max relu threshold threshold_backward hardtanh hardshrink hardshrink_backward softshrink_backward atan2 copysign
nan_to_num heaviside deg2rad rad2deg _conj_physical nextafter igamma igammac
eq ne lt le gt ge isnan isinf isneginf isposinf logical_and logical_not logical_or logical_xor signbit"""

_PRIMS_ONE = """neg pow sqrt rsqrt cbrt exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan sinh cosh tanh
asinh acosh atanh erf erfc erf_inv erfcx lgamma digamma bessel_i0 bessel_i0e bessel_i1 bessel_i1e bessel_j0 bessel_j1
ndtri sign signbit floor ceil round trunc remainder fmod maximum minimum fmax fmin atan2 conj_physical nextafter eq ne
lt le gt ge isfinite reciprocal"""


def _named(namespace: str, names: str) -> str:
    return " ".join(f"{namespace}{name}" for name in names.split())


ENTRIES: tuple[Entry, ...] = (
    entry(Kind.ELEMENTWISE, per_output(1), "add sub rsub prims.add prims.sub", "y (complex 2 y)"),
    entry(Kind.ELEMENTWISE, per_output(1, of_complex=6), "mul prims.mul", "y (complex 6 y)"),
    entry(Kind.ELEMENTWISE, per_output(1, of_complex=11), "div prims.div reciprocal", "y (complex 11 y)"),
    # Of a complex number two squares, their sum and its root.
    entry(Kind.ELEMENTWISE, per_output(1, of_complex=4), "abs prims.abs angle", "y (complex 4 y)"),
    entry(
        Kind.ELEMENTWISE,
        per_output(1),
        f"{_ONE} {_named('prims.', _PRIMS_ONE)}",
        "y",
    ),
    entry(Kind.ELEMENTWISE, per_output(4), "hypot prims.hypot", "4 y"),  # two squares, their sum, its root
    entry(Kind.ELEMENTWISE, per_output(2, of_complex=8), "prims.fma", "2 y"),
    entry(Kind.ELEMENTWISE, per_output(2), "xlogy special_xlog1py ldexp _add_relu", "2 y"),  # a function, a product
    entry(Kind.ELEMENTWISE, per_output(3), "sinc special_entr logit", "3 y"),
    entry(Kind.ELEMENTWISE, per_output(4), "logit_backward", "4 y"),  # g / (x (1 - x)), and the bounds
    # Maximum, difference, exp, log1p, sum.
    entry(Kind.ELEMENTWISE, per_output(5), "logaddexp logaddexp2", "5 y"),
    entry(Kind.ELEMENTWISE, per_value(0, "abs", 4), "polar", "4 x"),  # sine, cosine, two products
    entry(Kind.ELEMENTWISE, per_output(3, of_complex=8), "addcmul addcdiv lerp", "3 y"),
    # Activations. The derivative from the output y and one product: g (1 - y^2), g y (1 - y).
    entry(Kind.ELEMENTWISE, per_output(3), "tanh_backward sigmoid_backward", "3 y"),
    entry(Kind.ELEMENTWISE, per_output(2), "silu leaky_relu leaky_relu_backward", "2 y"),
    # g s (1 + x (1 - s)) with s = sigmoid(x).
    entry(Kind.ELEMENTWISE, per_output(6), "silu_backward", "6 y"),
    entry(Kind.ELEMENTWISE, gelu, "gelu", "5 y (tanh 9 y)"),
    entry(Kind.ELEMENTWISE, gelu_backward, "gelu_backward", "11 y (tanh 19 y)"),
    # log(1 + exp(b x)) / b; g z / (z + 1) with z = exp(b x).
    entry(Kind.ELEMENTWISE, per_output(4), "softplus", "4 y"),
    entry(Kind.ELEMENTWISE, per_output(5), "softplus_backward", "5 y"),
    # Comparison, exp - 1, factor; celu divides within exp. Backward: comparison, exp, two products.
    entry(Kind.ELEMENTWISE, per_output(3), "elu", "3 y"),
    entry(Kind.ELEMENTWISE, per_output(4), "celu elu_backward", "4 y"),
    # x tanh(log(1 + exp(x))); its backward runs as its parts.
    entry(Kind.ELEMENTWISE, per_output(4), "mish", "4 y"),
    # x min(max(x + 3, 0), 6) / 6, and g (x / 3 + 1/2) between two bounds.
    entry(Kind.ELEMENTWISE, per_output(5), "hardswish hardswish_backward", "5 y"),
    entry(Kind.ELEMENTWISE, per_output(4), "hardsigmoid", "4 y"),
    entry(Kind.ELEMENTWISE, per_output(3), "hardsigmoid_backward", "3 y"),
    entry(Kind.ELEMENTWISE, per_output(2), "hardtanh_backward softshrink", "2 y"),
    # Comparison and product; the weight's gradient g x is made too.
    entry(Kind.ELEMENTWISE, per_output(2), "_prelu_kernel rrelu_with_noise rrelu_with_noise_functional", "2 y"),
    entry(Kind.ELEMENTWISE, per_output(2), "rrelu_with_noise_backward", "2 y"),
    entry(Kind.ELEMENTWISE, per_output(3), "_prelu_kernel_backward", "3 y: both gradients at once"),
    # min(x, 0) - log(1 + z) with z = exp(-|x|); backward from the stored z: z / (1 + z), two signs, g.
    entry(Kind.ELEMENTWISE, per_output(6), "log_sigmoid_forward log_sigmoid_backward", "6 y"),
    # a sigmoid(b); backward: s, g s, and g a s (1 - s).
    entry(Kind.ELEMENTWISE, per_output(2), "glu", "2 y"),
    entry(Kind.ELEMENTWISE, per_input(6), "glu_backward", "6 x"),
    # Masked by the random draw, and scaled.
    entry(
        Kind.ELEMENTWISE,
        per_output(2),
        "native_dropout native_dropout_backward _fused_dropout _masked_scale",
        "2 y",
    ),
    # Division, shift, rounding, two bounds, shift, product.
    entry(
        Kind.ELEMENTWISE,
        per_output(7),
        """fake_quantize_per_tensor_affine_cachemask fake_quantize_per_channel_affine_cachemask
        _fake_quantize_per_tensor_affine_cachemask_tensor_qparams""",
        "7 y",
    ),
    # Interpolation of 2, 4, 8 and 16 values; backward a product and an addition for each.
    entry(Kind.ELEMENTWISE, interpolation(2), "upsample_linear1d", "3 y"),
    entry(Kind.ELEMENTWISE, interpolation(4), "upsample_bilinear2d", "7 y"),
    entry(Kind.ELEMENTWISE, interpolation(8), "upsample_trilinear3d", "15 y"),
    entry(Kind.ELEMENTWISE, interpolation(16), "upsample_bicubic2d", "31 y"),
    entry(Kind.ELEMENTWISE, per_input(4), "upsample_linear1d_backward", "4 x"),
    entry(Kind.ELEMENTWISE, per_input(8), "upsample_bilinear2d_backward", "8 x"),
    entry(Kind.ELEMENTWISE, per_input(16), "upsample_trilinear3d_backward", "16 x"),
    entry(Kind.ELEMENTWISE, per_input(32), "upsample_bicubic2d_backward", "32 x"),
    entry(Kind.ELEMENTWISE, antialiased(2), "_upsample_bilinear2d_aa", "two passes of 2 ceil(2 in / out) - 1"),
    entry(Kind.ELEMENTWISE, antialiased(4), "_upsample_bicubic2d_aa", "two passes of 2 ceil(4 in / out) - 1"),
    entry(
        Kind.ELEMENTWISE,
        antialiased_backward(2),
        "_upsample_bilinear2d_aa_backward",
        "two passes of 2 ceil(2 in / out)",
    ),
    entry(
        Kind.ELEMENTWISE, antialiased_backward(4), "_upsample_bicubic2d_aa_backward", "two passes of 2 ceil(4 in / out)"
    ),
    entry(Kind.ELEMENTWISE, grid_sampler(2), "grid_sampler_2d", "bilinear: 12 (points) + 7 y; bicubic: 46, 31"),
    entry(Kind.ELEMENTWISE, grid_sampler(3), "grid_sampler_3d", "28 (points) + 15 y"),
    entry(
        Kind.ELEMENTWISE,
        grid_sampler_backward(2),
        "grid_sampler_2d_backward",
        "bilinear: shared 12 (points); input: 8 x; grid: 24 x + 2 (points)",
    ),
    entry(
        Kind.ELEMENTWISE,
        grid_sampler_backward(3),
        "grid_sampler_3d_backward",
        "shared 28 (points); input: 16 x; grid: 72 x + 3 (points)",
    ),
    # Lists of tensors, as gradient clipping and optimizers meet them.
    entry(
        Kind.ELEMENTWISE,
        for_each(1),
        _named(
            "_foreach_",
            """abs acos add asin atan ceil clamp_max clamp_min cos cosh div erf erfc exp expm1 floor frac lgamma log
            log10 log1p log2 max maximum minimum mul neg pow reciprocal round rsqrt sigmoid sign sin sinh sqrt sub
            tan tanh trunc""",
        ),
        "x of all tensors",
    ),
    entry(
        Kind.ELEMENTWISE,
        for_each(2),
        "_foreach_norm _foreach_powsum _amp_foreach_non_finite_check_and_unscale",
        "2 x of all tensors",
    ),
    entry(Kind.ELEMENTWISE, for_each(3), "_foreach_addcmul _foreach_addcdiv _foreach_lerp", "3 x of all tensors"),
)
