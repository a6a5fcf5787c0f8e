"""The text side: text towers that are reduced, and the learned cross token of a text.

In: token ids or embeddings and their mask. Out: states in the user's columns. Read ``first_token`` (CrossGET's text
cross token in a decoder), ``rows`` (rows of different length), ``encoder`` (the loop over the layers for such rows),
``clip_text``, ``bert_text``, ``counts_per_text`` (MADTP), ``answer_decoder`` (BLIP's decoder, which reads a reduced
text).
"""

from mllm_crossget.moved import moved_names

__getattr__ = moved_names(__name__, "hooks.text.first_token", "hooks.ground.arguments")
