"""The loss and the cost at every k', and what follows from it. May import hf and what is below it.

Begin with curve.py: what a sweep's result says; it and its readers (allocation.py, budget.py, serving.py, card.py) are
pure and load no torch. request.py is what a sweep is asked for, on_megatron.py and on_transformers.py measure it;
tail_fit.py finds the tail scale. named_budgets.py: what a server offers; served.py: what it gave under load.
"""
