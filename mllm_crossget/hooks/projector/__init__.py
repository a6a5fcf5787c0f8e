"""From tower tokens to the features that replace the placeholders.

In: tokens of the tower, and which patches each of them stands for. Out: features per image, as ``get_image_features``
returns them. Read ``features`` (the base), ``kinds``, then the file of the family's kind: ``tiles``, ``pooled_tiles``,
``whole_grid``, ``packed_grid``, ``multi_layer``, ``resampler``, ``video_tower``. ``post_merge`` merges behind a
projector, and gives the features of merged cells. ``ragged_features`` is for counts per image, ``selected_output`` and
``averages`` are for methods that act at the tower's output. ``readers`` is for modules that cross-attend to the tower:
images of different numbers of tokens, and token sizes.
"""
