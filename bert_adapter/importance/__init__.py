"""How much each kernel's entries matter: what is measured of gradients, and kept."""
