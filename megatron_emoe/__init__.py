"""Elastic Mixture-of-Experts training on Megatron-Core."""
