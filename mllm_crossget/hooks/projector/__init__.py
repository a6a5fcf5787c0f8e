"""From tower tokens to the features that replace the placeholders.

In: tokens of the tower, and which patches each of them stands for. Out: features per image, as ``get_image_features``
returns them. Read ``features`` (the base), ``kinds``, then the file of the family's kind: ``tiles``, ``pooled_tiles``,
``whole_grid``, ``packed_grid``, ``multi_layer`` and ``aligned_states``, ``resampler``, ``video_tower``. ``post_merge``
merges behind a projector. ``cell_features`` gives the features of merged cells. ``ragged_features`` and ``readers`` are
for counts per image, ``selected_output`` is for methods that act at the tower's output.
"""
