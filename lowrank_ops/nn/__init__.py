"""The modules, and the plain chains of layers that they equal."""
