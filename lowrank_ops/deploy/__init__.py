"""A factorized model is prepared for inference, saved, loaded and exported."""
