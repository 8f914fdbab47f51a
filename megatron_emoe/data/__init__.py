"""From text files to batches, on Megatron's own formats and datasets. May import settings.

Begin with preprocess.py (documents -> tokenizer -> .bin and .idx) or datasets.py (those files -> batches). On the way
to the first: input_files.py tells what files are, corpus.py cuts them, encoder.py and joints.py make ids of the pieces,
result_files.py says what may be written. check.py refuses data and tokenizers that do not fit before work starts;
files.py reads the files' headers.
"""
