"""The language model's attention: a merged token counts as many times as the tokens it stands for.

In: log token sizes (B, C) of the columns of a call, or on the KV cache. Out: the stock language model's output. Read
``key_bias`` (how a bias of the keys reaches each attention implementation), then ``sized_model`` (the language model
that hands it to its layers and keeps it beside the cache).
"""
