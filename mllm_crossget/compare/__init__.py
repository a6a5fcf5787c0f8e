"""``mllm-crossget compare``: a user's own questions, answered under every method and budget on one model.

Read ``options`` (what can be set), ``questions`` (from a data file to questions), ``scoring`` (what counts as right),
``settings`` (which methods a model can serve). Then ``answering`` and ``run_costs`` (one run), ``runs`` (the file of
results), ``table`` and ``page`` (what is written), and ``command``, which joins them.
"""
