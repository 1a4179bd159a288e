"""A weight into factors: Tucker-2, CP and SVD, and the rules that choose ranks."""
