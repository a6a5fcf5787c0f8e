"""What all other rooms use: the journal, the state of hooked modules, learned tokens. It imports no other room.

Read ``journal`` (how a change is written down and undone), ``state`` (what a hooked module stores), then as needed
``cross_tokens``, ``alignment_tokens`` (learned modules), ``kv_cache``, ``vision_cache``, ``arguments``.
"""
