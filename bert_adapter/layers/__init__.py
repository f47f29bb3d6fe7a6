"""Kinds of layers that can be factorised."""
