"""Products with quantised matrices: matrix-vector, skinny and wide, and rows of them."""
