"""The user's call made compact: a full-length prompt in, the arguments of the stock call out.

Read ``placeholders`` (how many of them each image needs and keeps), ``compaction`` (which columns are kept),
``rope_positions`` (their positions) and ``token_sizes`` (how many columns each one stands for). Then read
``compact_call`` (all steps together) and ``user_view`` (what ``generate`` shows to the user's objects).
"""
