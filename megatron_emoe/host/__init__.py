"""The unmodified Megatron-Core on CPU and gloo. May import settings; Megatron only once host mode is on.

Begin with mode.py. flags.py has the flags that it needs and refuses, device.py answers torch.cuda by the CPU. engine.py
and adam.py are what a GPU needs too where Transformer Engine is not installed.
"""
