"""Hugging Face checkpoints in and out: one name table per architecture, one streaming reader and writer for all."""
