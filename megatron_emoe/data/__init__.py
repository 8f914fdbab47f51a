"""From text files to batches, on Megatron's own formats and datasets. May import settings.

Begin with preprocess.py (documents -> tokenizer -> .bin and .idx) or datasets.py (those files -> batches). check.py
refuses data and tokenizers that do not fit before work starts; files.py reads the files' headers.
"""
