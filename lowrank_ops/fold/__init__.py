"""BatchNorms and activations are folded into the layer before them."""
