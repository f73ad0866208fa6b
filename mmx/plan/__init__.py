"""Compiles programs for pods that are not there, and reads fit and traffic from them."""
