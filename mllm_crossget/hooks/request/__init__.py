"""The user's call made compact: a full-length prompt in, the arguments of the stock call out.

Read ``placeholders`` (how many of them each image needs and keeps), ``compaction`` (which columns stay),
``rope_positions`` (where they stand), ``token_sizes`` (what each stands for),
``compact_call`` (all of it together), ``user_view`` (what ``generate`` shows).
"""
