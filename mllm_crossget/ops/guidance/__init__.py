"""What a layer's attention and the learned tokens say about its tokens.

In: queries, keys and attention maps of a layer. Out: an importance or an alignment per token, and the losses that train
the learned tokens. To be read in this order: ``importance`` (what CrossGET removes first), ``attention_maps`` (the map
of few heads at a time), ``alignment`` (the cross tokens' loss), ``alignment_attention`` (MADTP), ``contrastive``
(retrieval).
"""
