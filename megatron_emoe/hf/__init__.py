"""Checkpoints from and to Hugging Face, and the proof that nothing changed. May import training and what is below it.

Begin with architecture.py: from a config.json to Megatron's flags and to the name table; olmoe.py and its neighbours
say what is special, registry.py finds the one for a folder. import_model.py and export_model.py stream; verify.py
compares whole models, layer_check.py single layers. active_experts.py runs any k' in a loaded transformers model.
"""
