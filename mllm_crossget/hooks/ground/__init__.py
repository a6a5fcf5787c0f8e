"""What every other room stands on: the journal, the state of hooked modules, learned tokens. Imports no other room.

Read ``journal`` (how a change is written down and undone), ``state`` (what a hooked module knows), then as needed
``cross_tokens``, ``alignment_tokens`` (learned modules), ``kv_cache``, ``vision_cache``, ``arguments``.
"""
