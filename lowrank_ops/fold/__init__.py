"""BatchNorms and activations that become part of the layer before them."""
