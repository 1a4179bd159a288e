"""Small helpers for torch and the process: autocast, eval mode, nested tensors, compiled models, torch's private names,
files. Imports no other folder."""
