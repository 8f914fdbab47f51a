"""A model of elastic layers, and its checkpoints. May import routing and settings.

Begin with layer_spec.py, which puts the elastic classes into Megatron-Core's specs. checkpoint.py and stored_model.py
say what a checkpoint holds and what may not change when it is continued; recovery.py what a dying run left. flops.py
counts what a model costs at any k'.
"""
