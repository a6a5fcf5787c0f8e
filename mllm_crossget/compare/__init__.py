"""``mllm-crossget compare``: a user's own questions, answered under every method and budget on one model.

Read ``compare_options`` (what can be set), ``samples`` (from a data file to questions), ``scoring`` (what is right),
``setting_names`` (which methods a model can serve). Then ``answering`` and ``run_costs`` (one run), ``runs`` (the file
of results), ``table`` and ``comparison_page`` (what is written), and ``command``, which joins them.
"""
