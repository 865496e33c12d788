"""Prices of matrix products: plain, batched, grouped, scaled, three-way."""

from math import prod

from gtflops.operators.call import Call
from gtflops.operators.cost import (
    FLOP_COUNTER,
    Entry,
    Flops,
    Formula,
    Kind,
    components,
    entry,
    multiply_adds,
    tensor,
)


def mm(call: Call) -> Flops:
    """(m, k) @ (k, n)."""
    (m, k), (_, n) = call.shape(0), call.shape(1)
    return Flops(matmul=multiply_adds(call, m * k * n))


def bmm(call: Call) -> Flops:
    """(b, m, k) @ (b, k, n)."""
    (b, m, k), (_, _, n) = call.shape(0), call.shape(1)
    return Flops(matmul=multiply_adds(call, b * m * k * n))


def _added(call: Call) -> int:
    """The addition of a tensor to a product: one an element that comes out; ``beta=0`` ignores the tensor."""
    return 0 if call.argument(3, "beta", 1) == 0 else components(call) * call.output.numel


def addmm(call: Call) -> Flops:
    """(m, k) @ (k, n) plus a bias."""
    (m, k), (_, n) = call.shape(1), call.shape(2)
    return Flops(multiply_adds(call, m * k * n), _added(call))


def addmm_activation(call: Call) -> Flops:
    """As ``addmm``, then ReLU (1 an element) or GELU (5)."""
    product = addmm(call)
    activation = 5 if call.argument(5, "use_gelu", False) else 1
    return Flops(product.matmul, product.other + activation * call.output.numel)


def baddbmm(call: Call) -> Flops:
    """(b, m, k) @ (b, k, n) plus a tensor."""
    (b, m, k), (_, _, n) = call.shape(1), call.shape(2)
    return Flops(multiply_adds(call, b * m * k * n), _added(call))


def addbmm(call: Call) -> Flops:
    """The sum over b of (b, m, k) @ (b, k, n), plus a matrix."""
    (b, m, k), (_, _, n) = call.shape(1), call.shape(2)
    return Flops(multiply_adds(call, b * m * k * n), _added(call))


def mv(call: Call) -> Flops:
    """(m, k) @ (k,). ``torch.utils.flop_counter`` has no formula for it."""
    m, k = call.shape(0)
    return Flops(matmul=multiply_adds(call, m * k))


def addmv(call: Call) -> Flops:
    """(m, k) @ (k,) plus a vector."""
    m, k = call.shape(1)
    return Flops(multiply_adds(call, m * k), _added(call))


def dot(call: Call) -> Flops:
    """(k,) . (k,)."""
    return Flops(matmul=multiply_adds(call, prod(call.shape(0))))


def addr(call: Call) -> Flops:
    """A matrix plus an outer product: a multiplication and an addition an element."""
    return Flops(other=multiply_adds(call, call.output.numel))


def _packed(call: Call) -> int:
    """Numbers in an element of the first operand: float4 tensors hold two in a byte."""
    return 2 if tensor(call, 0, "self").dtype.endswith("_x2") else 1


def scaled_mm(bias: int) -> Formula:
    """(m, k) @ (k, n) of scaled 8- or 4-bit floats.

    The scales multiply the result (2 an element: one for each operand), the bias, argument ``bias``, is one addition.
    """

    def formula(call: Call) -> Flops:
        (m, k), (_, n) = call.shape(0), call.shape(1)
        return Flops(2 * m * k * _packed(call) * n, _scales_and_bias(call, bias))

    return formula


def _scales_and_bias(call: Call, bias: int) -> int:
    return (2 + (call.argument(bias, "bias") is not None)) * call.output.numel


def _grouped_multiply_adds(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Rows sorted by group meet the matrix of their group, so that each row of a (T, k) operand is used once.

    (T, k) @ (g, k, n): T k n. (g, m, k) @ (k, T): m k T. (g, m, k) @ (g, k, n): g m k n. (m, T) @ (T, n), a product for
    each group over its share of T: m T n.
    """
    groups = a[0] if len(a) == len(b) == 3 else 1
    return groups * a[-2] * a[-1] * b[-1]


def grouped_mm(call: Call) -> Flops:
    """A matrix product for each group; all rows are taken to belong to one (``offs`` is data)."""
    products = multiply_adds(call, _grouped_multiply_adds(call.shape(0), call.shape(1)))
    return Flops(products, call.output.numel if call.argument(3, "bias") is not None else 0)


def scaled_grouped_mm(bias: int) -> Formula:
    """As ``_grouped_mm``, of scaled 8- or 4-bit floats; scales and bias as in ``_scaled_mm``."""

    def formula(call: Call) -> Flops:
        macs = _grouped_multiply_adds(call.shape(0), call.shape(1)) * _packed(call)
        return Flops(2 * macs, _scales_and_bias(call, bias))

    return formula


def grouped_mm_backward(call: Call) -> Flops:
    """transformers' own grouped product makes both gradients at once, each as many multiply-adds as forward."""
    return Flops(matmul=2 * multiply_adds(call, _grouped_multiply_adds(call.shape(0), call.shape(1))))


def trilinear(call: Call) -> Flops:
    """The sum of a b c over ``sumdim``, as two products of two, left to right.

    Each operand misses the dimensions of its ``expand`` list. a b: over all dimensions of the two; those of ``sumdim``
    that c misses are summed at once. Then that times c, summed over the rest. A product that sums is 2 FLOPs a term,
    one that does not is 1, outside of the matrix products. For ``nn.Bilinear`` with inputs (B, I) and (B, J) and O
    outputs: 2 B O I J, and 2 B O J.
    """
    lists = [call.argument(3 + position, f"expand{position + 1}") for position in range(3)]
    missing = [set(expanded) if isinstance(expanded, tuple) else set() for expanded in lists]
    summed = call.argument(6, "sumdim")
    over = set(summed) if isinstance(summed, tuple) else set()
    rank = len(call.shape(0)) + len(missing[0])
    sizes = []
    for position in range(3):
        given = iter(call.shape(position))
        sizes.append([1 if dimension in missing[position] else next(given) for dimension in range(rank)])
    at_once, later = over & missing[2], over - missing[2]
    both = [max(pair) for pair in zip(sizes[0], sizes[1], strict=True)]
    left = [1 if dimension in at_once else size for dimension, size in enumerate(both)]
    all_three = [max(pair) for pair in zip(left, sizes[2], strict=True)]
    matmul = other = 0
    for terms, sums in ((prod(both), at_once), (prod(all_three), later)):
        if sums:
            matmul += 2 * terms
        else:
            other += terms
    return Flops(matmul, other)


def euclidean_distances(call: Call) -> Flops:
    """``cdist`` by a matrix product: |a|^2 + |b|^2 - 2 a.b as one product over width + 2.

    (p, m) and (r, m): the squared norms 2 (p + r) m and the factor -2, p m; the product 2 p r (m + 2); the clamp at 0
    and the root, 2 p r.
    """
    *_, p, m = call.shape(0)
    r = call.shape(1)[-2]
    pairs = call.output.numel
    batch = pairs // (p * r) if p * r else 0
    return Flops(matmul=2 * pairs * (m + 2), other=batch * (2 * (p + r) * m + p * m) + 2 * pairs)


def weight_only_mm(call: Call) -> Flops:
    """(m, k) floats @ n rows of 8-bit integers; the scale of an output channel multiplies the result."""
    (m, k), n = call.shape(0), call.shape(1)[0]
    return Flops(2 * m * k * n, m * n)


def affine_grid(call: Call) -> Flops:
    """The positions of an image, (height width, 3), times the (3, 2) matrix of each sample; one dimension more in 3-d:
    2 (d + 1) for each of the d coordinates of a position."""
    return Flops(matmul=2 * call.output.numel * (call.output.shape[-1] + 1))


ENTRIES: tuple[Entry, ...] = (
    entry(Kind.MATRIX_PRODUCT, mm, "mm", "2 m k n", FLOP_COUNTER),
    entry(Kind.MATRIX_PRODUCT, mm, "_int_mm", "none on integers; 2 m k n on floats"),
    entry(Kind.MATRIX_PRODUCT, bmm, "bmm", "2 b m k n", FLOP_COUNTER),
    entry(Kind.MATRIX_PRODUCT, addmm, "addmm", "2 m k n; other: y", FLOP_COUNTER),
    entry(Kind.MATRIX_PRODUCT, addmm_activation, "_addmm_activation", "2 m k n; other: 2 y (GELU 6 y)"),
    entry(Kind.MATRIX_PRODUCT, baddbmm, "baddbmm", "2 b m k n; other: y (none where beta is 0)", FLOP_COUNTER),
    entry(Kind.MATRIX_PRODUCT, addbmm, "addbmm", "2 b m k n; other: y"),
    entry(Kind.MATRIX_PRODUCT, mv, "mv", "2 m k"),
    entry(Kind.MATRIX_PRODUCT, addmv, "addmv", "2 m k; other: y"),
    entry(Kind.MATRIX_PRODUCT, dot, "dot vdot", "2 k"),
    entry(Kind.MATRIX_PRODUCT, scaled_mm(4), "_scaled_mm", "2 m k n; other: 2 y (bias: 3 y)", FLOP_COUNTER),
    entry(Kind.MATRIX_PRODUCT, scaled_mm(8), "_scaled_mm_v2", "2 m k n; other: 2 y (bias: 3 y)"),
    entry(
        Kind.MATRIX_PRODUCT,
        grouped_mm,
        "_grouped_mm transformers.grouped_mm_fallback",
        "2 T k n for (T, k) @ (g, k, n); 2 g m k n for three dimensions; other: y for a bias",
    ),
    entry(
        Kind.MATRIX_PRODUCT,
        grouped_mm_backward,
        "transformers.grouped_mm_fallback_backward",
        "4 T k n: both gradients at once",
    ),
    entry(Kind.MATRIX_PRODUCT, scaled_grouped_mm(5), "_scaled_grouped_mm", "2 T k n; other: 2 y (bias: 3 y)"),
    entry(Kind.MATRIX_PRODUCT, scaled_grouped_mm(9), "_scaled_grouped_mm_v2", "2 T k n; other: 2 y (bias: 3 y)"),
    entry(Kind.MATRIX_PRODUCT, weight_only_mm, "_weight_int8pack_mm", "2 m k n; other: y"),
    entry(Kind.MATRIX_PRODUCT, trilinear, "_trilinear", "nn.Bilinear: 2 B O I J + 2 B O J"),
    entry(
        Kind.MATRIX_PRODUCT, euclidean_distances, "_euclidean_dist", "2 p r (m + 2); other: 2 (p + r) m + p m + 2 p r"
    ),
    entry(Kind.MATRIX_PRODUCT, affine_grid, "affine_grid_generator", "2 (d + 1) y for d coordinates"),
    entry(Kind.ELEMENTWISE, addr, "addr", "2 y"),
)
