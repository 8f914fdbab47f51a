"""A run: from the command line to the loop that Megatron drives. May import data, host, model, routing, settings.

Begin with first_look.py (the command line before Megatron is imported), arguments.py (the command line, checked) and
loop.py (the forward step). distillation.py is a part of its loss, gradient_check.py ends a run with weights that get no
gradient. evaluation.py gives the loss at any k', held_out.py the model and the data to evaluate. exit_signals.py and
profiling.py are about the process.
"""
