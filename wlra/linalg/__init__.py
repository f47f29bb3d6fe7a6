"""Linear algebra: Gram matrices, decompositions, batches."""
