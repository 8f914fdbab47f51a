"""From text files to batches, on Megatron's own formats and datasets. May import settings.

Begin with preprocess.py (documents -> tokenizer -> .bin and .idx) or datasets.py (those files -> batches). On the way
to the first: input_files.py tells what files are, corpus.py cuts them, encoder.py and joints.py make ids of the pieces,
result_files.py says what may be written. Chats go the same way by chat_request.py (flags and files), chat_records.py,
chat_template.py and chat_encoder.py, and become batches in packed_chats.py. check.py refuses data and tokenizers that
do not fit before work starts; files.py reads the files' headers.
"""
