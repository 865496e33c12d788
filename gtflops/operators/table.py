"""The operator FLOPs table: every operator is priced, declared free, or unsupported; none is silently zero."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from gtflops.operators import formulas as f
from gtflops.operators.call import Call
from gtflops.operators.formulas import Flops, FlopsByOutput, Formula


class Kind(StrEnum):
    """What an operator does, for tables by class."""

    MATRIX_PRODUCT = "matrix product"
    CONVOLUTION = "convolution"
    ATTENTION = "attention"
    NORMALISATION = "normalisation"
    REDUCTION = "reduction"
    ELEMENTWISE = "elementwise"
    RANDOM = "random"
    FREE = "free"


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the table: the operators, without overload, that share a formula."""

    kind: Kind
    formula: Formula
    ops: tuple[str, ...]


def _entries() -> Iterator[Entry]:
    def entry(kind: Kind, formula: Formula, ops: str) -> Entry:
        return Entry(kind, formula, tuple(f"aten.{op}" for op in ops.split()))

    yield entry(Kind.MATRIX_PRODUCT, f.mm, "mm")
    yield entry(Kind.MATRIX_PRODUCT, f.bmm, "bmm")
    yield entry(Kind.MATRIX_PRODUCT, f.addmm, "addmm _addmm_activation")
    yield entry(Kind.MATRIX_PRODUCT, f.baddbmm, "baddbmm")
    yield entry(Kind.MATRIX_PRODUCT, f.mv, "mv")
    yield entry(Kind.MATRIX_PRODUCT, f.addmv, "addmv")
    yield entry(Kind.MATRIX_PRODUCT, f.dot, "dot vdot")

    yield entry(Kind.CONVOLUTION, f.convolution, "convolution")
    yield entry(Kind.CONVOLUTION, f.convolution_backward, "convolution_backward")

    yield entry(
        Kind.ATTENTION,
        f.attention,
        """_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
        _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention""",
    )
    yield entry(
        Kind.ATTENTION,
        f.attention_backward,
        """_scaled_dot_product_flash_attention_for_cpu_backward _scaled_dot_product_flash_attention_backward
        _scaled_dot_product_efficient_attention_backward _scaled_dot_product_cudnn_attention_backward""",
    )

    yield entry(Kind.NORMALISATION, f.layer_norm, "native_layer_norm")
    yield entry(Kind.NORMALISATION, f.layer_norm_backward, "native_layer_norm_backward")
    yield entry(Kind.NORMALISATION, f.batch_norm, "native_batch_norm")
    yield entry(Kind.NORMALISATION, f.batch_norm_backward, "native_batch_norm_backward")
    yield entry(Kind.NORMALISATION, f.group_norm, "native_group_norm")
    yield entry(Kind.NORMALISATION, f.group_norm_backward, "native_group_norm_backward")
    yield entry(Kind.NORMALISATION, f.rms_norm, "_fused_rms_norm")
    yield entry(Kind.NORMALISATION, f.rms_norm_backward, "_fused_rms_norm_backward")
    # Subtract the maximum, exp, sum, and divide or subtract the logarithm.
    yield entry(Kind.NORMALISATION, f.per_output_element(f.SOFTMAX_FLOPS), "_softmax _log_softmax _safe_softmax")
    yield entry(
        Kind.NORMALISATION,
        f.per_output_element(f.SOFTMAX_BACKWARD_FLOPS),
        "_softmax_backward_data _log_softmax_backward_data",
    )

    yield entry(
        Kind.REDUCTION,
        f.per_input_element(1),
        "sum nansum prod amax amin max min argmax argmin any all cumsum cumprod topk sort",
    )
    yield entry(Kind.REDUCTION, f.per_input_element(1, and_per_output=1), "mean")
    # Mean 1, centre 1, square 1, sum 1; a division (and a root) for each result.
    yield entry(Kind.REDUCTION, f.per_input_element(4, and_per_output=1), "var var_mean")
    yield entry(Kind.REDUCTION, f.per_input_element(4, and_per_output=2), "std")
    yield entry(Kind.REDUCTION, f.per_input_element(2, and_per_output=1), "linalg_vector_norm norm")
    # exp after subtracting the maximum, and the sum; a logarithm for each result.
    yield entry(Kind.REDUCTION, f.per_input_element(4, and_per_output=2), "logsumexp")
    # One log-probability a target is read and added; its gradient is one product a target.
    yield entry(Kind.REDUCTION, f.per_target, "nll_loss_forward nll_loss_backward")
    yield entry(Kind.REDUCTION, f.per_input_element(1), "embedding_dense_backward")
    yield entry(Kind.REDUCTION, f.index_put, "index_put _index_put_impl _unsafe_index_put")
    yield entry(Kind.REDUCTION, f.accumulate_values(3, "source"), "index_add")
    yield entry(Kind.REDUCTION, f.accumulate_values(3, "src"), "scatter_add")

    yield entry(
        Kind.ELEMENTWISE,
        f.per_output_element(1),
        """add sub rsub mul div neg abs reciprocal pow sqrt rsqrt exp exp2 expm1 log log2 log1p
        sin cos tan tanh sigmoid erf sign floor ceil round trunc remainder fmod floor_divide
        maximum minimum clamp clamp_min clamp_max relu threshold_backward hardtanh
        eq ne lt le gt ge isnan isinf isneginf isposinf logical_and logical_not logical_or logical_xor""",
    )
    # The derivative from the output y and one product: g (1 - y^2), g y (1 - y).
    yield entry(Kind.ELEMENTWISE, f.per_output_element(3), "tanh_backward sigmoid_backward")
    yield entry(Kind.ELEMENTWISE, f.per_output_element(2), "silu leaky_relu leaky_relu_backward")
    # g s (1 + x (1 - s)) with s = sigmoid(x).
    yield entry(Kind.ELEMENTWISE, f.per_output_element(6), "silu_backward")
    yield entry(Kind.ELEMENTWISE, f.gelu, "gelu")
    yield entry(Kind.ELEMENTWISE, f.gelu_backward, "gelu_backward")
    yield entry(Kind.ELEMENTWISE, f.per_output_element(3), "addcmul addcdiv lerp")
    # Difference and square; their derivative is difference, product, product.
    yield entry(Kind.ELEMENTWISE, f.squared_error, "mse_loss")
    yield entry(Kind.ELEMENTWISE, f.per_output_element(3), "mse_loss_backward")
    # Masked by the random draw, and scaled.
    yield entry(Kind.ELEMENTWISE, f.per_output_element(2), "native_dropout native_dropout_backward")

    yield entry(
        Kind.RANDOM,
        f.free,
        "bernoulli rand rand_like randn randn_like randint uniform normal exponential multinomial randperm",
    )

    yield entry(  # views
        Kind.FREE,
        f.free,
        """view _unsafe_view _reshape_alias t transpose permute expand unsqueeze squeeze slice
        select split split_with_sizes unbind as_strided detach alias diagonal unfold
        view_as_real view_as_complex lift_fresh lift""",
    )
    yield entry(  # allocation and fills
        Kind.FREE,
        f.free,
        """empty empty_like empty_strided empty_permuted new_empty new_empty_strided zeros zeros_like new_zeros
        ones ones_like new_ones full full_like new_full zero fill arange scalar_tensor eye linspace tril_indices
        triu_indices set resize""",
    )
    yield entry(  # copies and selections
        Kind.FREE,
        f.free,
        """clone copy _to_copy cat stack index index_select gather take embedding where masked_fill
        masked_select repeat repeat_interleave constant_pad_nd slice_backward select_backward slice_scatter
        select_scatter scatter index_copy index_fill diagonal_backward diagonal_copy flip roll tril triu
        embedding_renorm unfold_backward as_strided_scatter""",
    )
    yield entry(  # integers, bits and questions to the host
        Kind.FREE,
        f.free,
        """bitwise_and bitwise_or bitwise_xor bitwise_not bitwise_left_shift bitwise_right_shift bincount nonzero
        searchsorted bucketize _local_scalar_dense equal is_same_size _assert_async
        _assert_scalar""",
    )


TABLE: tuple[Entry, ...] = tuple(_entries())


def _index(entries: tuple[Entry, ...]) -> dict[str, Entry]:
    index: dict[str, Entry] = {}
    for entry in entries:
        for op in entry.ops:
            if op in index:
                raise ValueError(f"{op} stands twice in the operator table")
            index[op] = entry
    return index


_BY_OP = _index(TABLE)


def lookup(op: str) -> Entry | None:
    """The table's entry for an operator named with or without overload, in place or not; ``None`` if it has none.

    >>> lookup("aten.add_.Tensor") is lookup("aten.add")
    True
    """
    namespace, _, name = op.partition(".")
    name = name.partition(".")[0]
    found = _BY_OP.get(f"{namespace}.{name}")
    if found is None and name.endswith("_") and not name.endswith("__"):
        found = _BY_OP.get(f"{namespace}.{name[:-1]}")
    return found


def price(call: Call) -> Flops | FlopsByOutput | None:
    """FLOPs of an operator call, or ``None`` where the table has no entry for it.

    >>> from gtflops.operators import TensorType
    >>> a, b = TensorType((2, 3), "float32"), TensorType((3, 5), "float32")
    >>> price(Call("aten.mm.default", (a, b), (), (TensorType((2, 5), "float32"),)))
    Flops(matmul=60, other=0)
    """
    entry = lookup(call.op)
    return None if entry is None else entry.formula(call)
