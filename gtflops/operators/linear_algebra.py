"""Prices of Fourier transforms, factorisations and solves, none of which is a matrix product to PyTorch's counter."""

from math import log2, prod

from gtflops.operators.call import Call
from gtflops.operators.cost import Entry, Flops, Formula, Kind, components, entry, integers

FFT = "convention: 5 N log2 N real operations (radix 2), half on real numbers; Frigo & Johnson, benchFFT"
GOLUB = "Golub & Van Loan, Matrix Computations, leading terms"


def _transform(shape: tuple[int, ...], dimensions: tuple[int, ...], halves: int) -> Flops:
    """``halves`` x 2.5 N log2 n, of N numbers in transforms of n, rounded. Scaling is not counted, nor does it matter
    how a length is factored: it is a convention."""
    length = prod(shape[dimension] for dimension in dimensions)
    return Flops(other=round(2.5 * halves * prod(shape) * log2(length)) if length else 0)


def complex_fft(call: Call) -> Flops:
    """5 N log2 n."""
    return _transform(call.shape(0), integers(call, 1, "dim"), 2)


def real_fft(call: Call) -> Flops:
    """2.5 N log2 n of N real numbers."""
    return _transform(call.shape(0), integers(call, 1, "dim"), 1)


def inverse_real_fft(call: Call) -> Flops:
    """2.5 N log2 n of N real numbers that come out."""
    return _transform(call.output.shape, integers(call, 1, "dim"), 1)


def _matrices(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """How many, and their longer and shorter side."""
    *batch, rows, columns = shape
    return prod(batch), max(rows, columns), min(rows, columns)


def _real(call: Call) -> int:
    """A complex multiply-add is four real ones."""
    return 4 if components(call) == 2 else 1


def cubic(numerator: int, denominator: int) -> Formula:
    """``numerator / denominator`` n^3 for each n x n matrix, rounded."""

    def formula(call: Call) -> Flops:
        count, n, _ = _matrices(call.shape(0))
        return Flops(other=_real(call) * round(count * numerator * n**3 / denominator))

    return formula


def lu(call: Call) -> Flops:
    """n^2 (m - n / 3) for sides m >= n, which is 2/3 n^3 on a square."""
    count, m, n = _matrices(call.shape(0))
    return Flops(other=_real(call) * round(count * n * n * (3 * m - n) / 3))


def householder(call: Call) -> Flops:
    """2 n^2 (m - n / 3): the reflections of a QR factorisation, or their product."""
    count, m, n = _matrices(call.shape(0))
    return Flops(other=_real(call) * round(count * 2 * n * n * (3 * m - n) / 3))


def qr(call: Call) -> Flops:
    """The reflections, and for the reduced or complete mode Q from them at the same price."""
    price = householder(call)
    return price if call.argument(1, "mode", "reduced") == "r" else Flops(other=2 * price.other)


def determinant(call: Call) -> Flops:
    """LU, and the product of the diagonal."""
    count, _, n = _matrices(call.shape(0))
    return Flops(other=lu(call).other + _real(call) * count * n)


def triangular_solve(matrix: int) -> Formula:
    """n^2 for each right-hand side of n numbers; the matrix is argument ``matrix``."""
    return lambda call: Flops(other=_real(call) * call.output.numel * call.shape(matrix)[-1])


def factored_solve(call: Call) -> Flops:
    """Two triangular solves: 2 n^2 for each right-hand side."""
    return Flops(other=_real(call) * 2 * call.output.numel * call.shape(0)[-2])


def cholesky_solve(call: Call) -> Flops:
    """Two triangular solves; the factor is the second argument."""
    return Flops(other=_real(call) * 2 * call.output.numel * call.shape(1)[-1])


def solve(call: Call) -> Flops:
    """LU, and two triangular solves."""
    return Flops(other=lu(call).other + factored_solve(call).other)


ENTRIES: tuple[Entry, ...] = (
    entry(Kind.LINEAR_ALGEBRA, complex_fft, "_fft_c2c prims.fft_c2c", "5 x log2 n", FFT),
    entry(Kind.LINEAR_ALGEBRA, real_fft, "_fft_r2c prims.fft_r2c", "2.5 x log2 n", FFT),
    entry(Kind.LINEAR_ALGEBRA, inverse_real_fft, "_fft_c2r prims.fft_c2r", "2.5 y log2 n", FFT),
    entry(Kind.LINEAR_ALGEBRA, cubic(1, 3), "linalg_cholesky_ex cholesky", "n^3 / 3", GOLUB),
    entry(Kind.LINEAR_ALGEBRA, cubic(2, 3), "cholesky_inverse", "2/3 n^3", GOLUB),
    entry(Kind.LINEAR_ALGEBRA, cubic(2, 1), "linalg_inv_ex", "2 n^3", GOLUB),
    entry(Kind.LINEAR_ALGEBRA, lu, "linalg_lu_factor_ex linalg_lu", "n^2 (m - n / 3)", GOLUB),
    entry(Kind.LINEAR_ALGEBRA, determinant, "_linalg_det _linalg_slogdet", "n^2 (m - n / 3) + n", GOLUB),
    entry(Kind.LINEAR_ALGEBRA, householder, "geqrf linalg_householder_product", "2 n^2 (m - n / 3)", GOLUB),
    entry(Kind.LINEAR_ALGEBRA, qr, "linalg_qr", "4 n^2 (m - n / 3), without Q half of it", GOLUB),
    entry(Kind.LINEAR_ALGEBRA, triangular_solve(0), "linalg_solve_triangular", "n y", GOLUB),
    entry(Kind.LINEAR_ALGEBRA, triangular_solve(1), "triangular_solve", "n y", GOLUB),
    entry(Kind.LINEAR_ALGEBRA, factored_solve, "linalg_lu_solve", "2 n y", GOLUB),
    entry(Kind.LINEAR_ALGEBRA, cholesky_solve, "cholesky_solve _cholesky_solve_helper", "2 n y", GOLUB),
    entry(Kind.LINEAR_ALGEBRA, solve, "_linalg_solve_ex", "2/3 n^3 + 2 n y", GOLUB),
)
