"""lm-eval's tasks at every k'. May import sweep and what is below it.

Begin with request.py (what is asked for) and run.py: one k' after another, rows counted. on_megatron.py and
on_transformers.py bring the model; lm_eval_model.py is lm-eval's interface to a Megatron model, forward_server.py what
its other ranks do.
"""
