"""A factorized model trained to give what its dense original gives."""
