"""What torch and the process do around a call: autocast, nested tensors, torch.compile, files.."""
