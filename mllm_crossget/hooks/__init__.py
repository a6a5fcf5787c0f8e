"""The only code that alters a model, instance by instance, and the journal that undoes it.

Rooms from the ground up, each of which imports only earlier ones: ``ground``, ``tower``, ``projector``, ``text``,
``language``, ``request``, ``reuse``, ``model``. ``apply`` is on top: everything that ``accelerate_mllm`` changes, in order.
"""
