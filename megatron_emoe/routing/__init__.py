"""Which experts run, and what they weigh: the subclasses of Megatron-Core's router and MoE layer. May import settings.

Begin with router.py (one layer's way from hidden states to a routing map) and moe_layer.py. active_k.py says which k
applies now, active_experts.py is what a loop of one's own tells it; selection.py is routing as pure tensor functions,
kernel.py the same in one pass on a GPU. transformer_config.py is Megatron's configuration with the elastic fields,
combinations.py what it refuses.
"""
