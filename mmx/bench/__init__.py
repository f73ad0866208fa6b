"""Measurements: kernels against references and ceilings, prefill and decode of one period."""
