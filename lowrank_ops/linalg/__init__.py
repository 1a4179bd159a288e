"""Matrices: leading singular vectors, triangles, square roots."""
