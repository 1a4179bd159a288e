"""Training of a factorized model to give the outputs of its dense original."""
