"""Linear algebra on large matrices: leading singular vectors, lower triangles, square roots.

May import: runtime, text.
"""
