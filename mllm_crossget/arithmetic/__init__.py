"""Plain numbers: sizes, removals, FLOPs, measured milliseconds, intervals. No tensor and no model is involved.

In: sizes of towers and language models, and dials. Out: integers and floats. To be read in this order: ``geometry``
(sizes), ``removals`` (how many tokens each layer removes), ``flop_formulas`` and ``language_flops`` (costs by formula),
``layer_times`` (costs by the clock), ``intervals`` (how sure an accuracy is).
"""
