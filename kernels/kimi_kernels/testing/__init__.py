"""Helps to test kernels where there is no GPU; nothing here is needed to run them."""
