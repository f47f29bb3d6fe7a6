"""What Gram matrices of a kernel's larger side are on its smaller side: all that closed forms need of them.

Factors of a wide kernel W by weights of rows and columns are left = W col right' and right, rows of W combined: of col
they need W col W' alone, which is a sum over what has passed through the kernel already. Of 768 x 3072 that is a
sixteenth of the numbers, and fewer operations.
"""

from typing import Any, NamedTuple

import numpy as np

FAR = 2  # as many times as large as the other a side must be


class Through(NamedTuple):
    """Of a Gram matrix (n, n) of the larger side of a kernel W (m, n), what it is on the smaller side; or of W'.

    matrix: W gram W' (m, m); `Upper` where it is held in numbers.
    mean: of the diagonal of the Gram matrix itself.
    squares: sum_b ||W gram_b W'||_F**2 over examples, where that is known; as of one gradient where an example has
      several and W is wide.
    of_identity: W W', where that is known.
    """

    matrix: Any
    mean: Any
    squares: Any = None
    of_identity: Any = None


def larger_side(shape: tuple[int, int]) -> int | None:
    """0 if a kernel has far more inputs than outputs, 1 if it has far fewer, None if it is about square."""
    rows, columns = shape
    return 0 if rows >= FAR * columns else 1 if columns >= FAR * rows else None


def of_kernel(through: Through, kernel: Any, shape: tuple[int, int]) -> Through:
    """The same, once it is known what the kernel, of that shape as a matrix, makes of the identity."""
    kernel = np.asarray(kernel, np.float32).reshape(shape)
    wide = kernel if kernel.shape[0] <= kernel.shape[1] else kernel.T
    return through._replace(of_identity=wide @ wide.T)


def diagonal_mean(gram: Any) -> float:
    """The mean of the diagonal."""
    if isinstance(gram, Through):
        return float(gram.mean)
    return float(np.mean(np.diagonal(gram), dtype=np.float64))
