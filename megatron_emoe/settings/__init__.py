"""What a person can set, and the rules between settings. May import nothing of the package, neither torch nor Megatron.

Begin with elastic_config.py: every elastic setting with unit, source and default. elastic_rules.py and
baseline_rules.py hold what settings must satisfy; k_schedule.py says which k a schedule draws, tail_scale.py reads the
words of one setting. field_flags.py makes flags of the fields, command_line.py is argparse as programs use it,
flag_types.py and paths.py check words and files, flag_files.py reads @FILE, refusal.py ends a program that will not
start, quiet.py leaves out what libraries say at every start. atomic_file.py and result_file.py leave a file whole or
not there.
"""
