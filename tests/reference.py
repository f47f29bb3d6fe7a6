"""Twins of the algorithms in NumPy and float64, as their formulas say, without regard to speed or to rounding."""

import numpy as np


def loss(W, weights, product):
    """sum weights (W - product)**2 / sum weights W**2; entries without weight may be anything."""
    W, weights, product = as_float64(W, weights, product)
    W = np.where(weights > 0, W, 0)
    return np.sum(weights * (W - product) ** 2) / np.sum(weights * W**2)


def product(factors):
    """left @ right of a pair, or of anything that begins with one."""
    left, right = as_float64(*factors[:2])
    return left @ right


def objective(W, weights, product, nuclear):
    """sum weights (W - product)**2 / 2 + nuclear ||product||_*, over that of zero."""
    W, weights, product = as_float64(W, weights, product)
    zero = np.sum(weights * W**2)
    return (np.sum(weights * (W - product) ** 2) + 2 * nuclear * np.linalg.svd(product)[1].sum()) / zero


def eckart_young(W, k, nuclear=0.0):
    """The best approximation of rank k for equal weights, with a penalty on the nuclear norm if any."""
    u, s, vt = np.linalg.svd(np.asarray(W, np.float64), full_matrices=False)
    return (u[:, :k] * np.maximum(s[:k] - nuclear, 0)) @ vt[:k]


def separable(W, p, q, k):
    """The best approximation of rank k for the weights p_i q_j; zero where they are."""
    p, q = as_float64(p, q)
    scale = np.sqrt(np.outer(p, q))
    return np.divide(eckart_young(scale * W, k), scale, out=np.zeros(scale.shape), where=scale > 0)


def fwsvd(W, weights, k):
    """The best approximation of rank k for weights that are replaced by their row sums."""
    weights = np.asarray(weights, np.float64)
    return separable(W, weights.sum(1), np.ones(weights.shape[1]), k)


def kronecker(W, row, col, k):
    """The best approximation of rank k for the error trace(row E col E')."""
    row_root, row_inverse = roots(row)
    col_root, col_inverse = roots(col)
    return row_inverse @ eckart_young(row_root @ W @ col_root, k) @ col_inverse


def kronecker_loss(W, row, col, product):
    """trace(row E col E') of E = W - product, over that of E = W."""
    W, row, col, product = as_float64(W, row, col, product)
    return np.trace(row @ (W - product) @ col @ (W - product).T) / np.trace(row @ W @ col @ W.T)


def roots(matrix):
    """The square root of a positive semi-definite matrix, and the pseudo-inverse of that root."""
    values, vectors = np.linalg.eigh(np.asarray(matrix, np.float64))
    root = np.sqrt(np.where(values > 1e-10 * values.max(), values, 0))
    inverse = np.divide(1, root, out=np.zeros_like(root), where=root > 0)
    return (vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T


def complete(W, weights, X):
    """The target where its weight is 1, X where it is 0, and their mean between."""
    return weights * W + (1 - weights) * X


def em_map(W, weights, X, k, nuclear=0.0):
    """Srebro & Jaakkola 2003, sec. 3; with a penalty, soft-impute (Mazumder, Hastie & Tibshirani 2010, alg. 1)."""
    return eckart_young(complete(W, weights, X), k, nuclear)


def unit_weights(W, weights, nuclear):
    """The same problem with the weights over their maximum."""
    return *as_float64(W, weights / np.max(weights)), nuclear / np.max(weights)


def em(W, weights, k, steps, nuclear=0.0):
    """Every X, from the best for equal weights and without penalty on."""
    W, weights, nuclear = unit_weights(W, weights, nuclear)
    X = [eckart_young(W, k)]
    for _ in range(steps):
        X.append(em_map(W, weights, X[-1], k, nuclear))
    return X


def nesterov(W, weights, k, steps, nuclear=0.0):
    """Tuzhilina & Hastie 2021, sec. 3.1: the map of X + (t - 1) / (t + 2) (X - previous X), t = 1, 2, ..."""
    W, weights, nuclear = unit_weights(W, weights, nuclear)
    X = [eckart_young(W, k)]
    for t in range(1, steps + 1):
        ahead = X[-1] if t == 1 else X[-1] + (t - 1) / (t + 2) * (X[-1] - X[-2])
        X.append(em_map(W, weights, ahead, k, nuclear))
    return X


def anderson(W, weights, k, steps, nuclear=0.0, earlier=5):
    """Tuzhilina & Hastie 2021, sec. 3.2: the best of the combinations of the last completed matrices.

    Their coefficients are theta / sum(theta), (R R') theta = 1 for the residuals R, Y_t less the combination before.
    """
    W, weights, nuclear = unit_weights(W, weights, nuclear)
    X, Y, residuals, mixed = [eckart_young(W, k)], [], [], np.zeros_like(W)
    for _ in range(steps):
        Y = [*Y, complete(W, weights, X[-1])][-earlier - 1 :]
        residuals = [*residuals, (Y[-1] - mixed).ravel()][-earlier - 1 :]
        R = np.array(residuals)
        theta = np.linalg.solve(R @ R.T, np.ones(len(R)))
        mixed = np.tensordot(theta / theta.sum(), np.array(Y), 1)
        X.append(eckart_young(mixed, k, nuclear))
    return X


PUBLISHED = {"em": em, "nesterov": nesterov, "anderson": anderson}


def als(W, weights, left, right):
    """One sweep: every row of `left`, then every column of `right`, by weighted least squares."""
    left = best_rows(W, weights, right)
    return left, best_rows(W.T, weights.T, left.T).T


def best_rows(W, weights, right):
    """Row i minimises sum_j weights_ij (W_ij - row @ right_j)**2."""
    root = np.sqrt(weights)
    return np.stack([np.linalg.lstsq(r[:, None] * right.T, r * w, rcond=None)[0] for r, w in zip(root, W, strict=True)])


def stationarity(W, weights, left, right):
    """The share of the gradient in the tangent space of rank-k matrices, by orthonormal bases of both factors."""
    W, weights, left, right = as_float64(W, weights, left, right)
    gradient = weights * (W - left @ right)
    U, V = np.linalg.qr(left)[0], np.linalg.qr(right.T)[0]
    tangent = U @ U.T @ gradient + gradient @ V @ V.T - U @ U.T @ gradient @ V @ V.T
    return np.linalg.norm(tangent) / np.linalg.norm(gradient)


def as_float64(*arrays):
    return tuple(np.asarray(array, np.float64) for array in arrays)


def descend(W, weights, left, right, steps=80):
    """The loss of a local minimum below the factors, off saddles too: Newton's steps with all curvatures positive."""
    (m, k), n = left.shape, right.shape[1]
    rng, damping = np.random.default_rng(0), 1e-3
    left = left + 1e-4 * np.abs(left).max() * rng.normal(size=left.shape)
    right = right + 1e-4 * np.abs(right).max() * rng.normal(size=right.shape)
    now = loss(W, weights, left @ right)
    for _ in range(steps):
        rest = weights * (W - left @ right)
        gradient = -np.concatenate([(rest @ right.T).ravel(), (left.T @ rest).ravel()])
        hessian = np.zeros((m * k + k * n,) * 2)
        hessian[: m * k, : m * k] = np.einsum("ij,kj,lj,ip->ikpl", weights, right, right, np.eye(m)).reshape(m * k, -1)
        hessian[m * k :, m * k :] = np.einsum("ij,ik,il,jp->kjlp", weights, left, left, np.eye(n)).reshape(k * n, -1)
        cross = np.einsum("ij,kj,il->iklj", weights, right, left) - np.einsum("ij,kl->iklj", rest, np.eye(k))
        hessian[: m * k, m * k :] = cross.reshape(m * k, -1)
        hessian[m * k :, : m * k] = hessian[: m * k, m * k :].T
        values, vectors = np.linalg.eigh(hessian)
        for _ in range(12):
            size = np.maximum(np.abs(values), 1e-12 * np.abs(values).max()) + damping * np.abs(values).max()
            move = -vectors @ ((vectors.T @ gradient) / size)
            ahead = left + move[: m * k].reshape(m, k), right + move[m * k :].reshape(k, n)
            if (after := loss(W, weights, ahead[0] @ ahead[1])) < now:
                break
            damping *= 10
        else:
            break
        (left, right), now, damping = ahead, after, max(damping / 10, 1e-14)
    return now
