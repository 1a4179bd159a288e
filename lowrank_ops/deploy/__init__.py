"""A factorized model prepared, saved, loaded, exported."""
