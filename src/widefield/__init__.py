"""Receptive fields in convolutional networks."""
