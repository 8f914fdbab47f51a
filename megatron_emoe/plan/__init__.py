"""What a job needs before it starts: memory, bytes, FLOPs, and whether it would start at all. May import sweep and what
is below it, but not tasks.

Begin with model.py (the model that a plan is for) and search.py (the best layout that fits). layout.py has the rules of
a layout, parameters.py, memory.py and traffic.py what it costs on a rank; check.py compares with models really built;
job.py and preflight.py check a job's command line; kept.py keeps what Megatron says of a model's flags, given.py reads
what a run's own flags fix.
"""
