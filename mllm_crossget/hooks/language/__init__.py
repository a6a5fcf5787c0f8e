"""The language model's attention: a merged token counts as often as the number of tokens it stands for.

In: log token sizes (B, C) of the columns of a call, or on the KV cache. Out: the stock language model's output. Read
``key_bias`` (how a key bias reaches each attention implementation), then ``sized_model`` (the language model, which
passes the bias to its layers and keeps it beside the cache), and ``sized_readers`` (modules that cross-attend to the
tower, which weigh its tokens in the same way).
"""
