"""The only code that alters a model, instance by instance, and the journal that undoes it.

Rooms from the ground up, each of which imports only earlier ones: ``ground``, ``tower``, ``projector``, ``text``,
``language``, ``request``, ``reuse``, ``model``. ``apply`` uses all of them: it makes every change of
``accelerate_mllm``, in order.
"""
