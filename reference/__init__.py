"""The readable NumPy model, imported as `bitnet_numba.reference`: what the fast backends are tested against."""
