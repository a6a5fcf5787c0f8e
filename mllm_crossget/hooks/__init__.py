"""The only code that changes a model, instance by instance, and the journal by which the changes are undone.

Rooms from the ground up, each of which imports only earlier ones: ``ground``, ``tower``, ``projector``, ``text``,
``language``, ``request``, ``reuse``, ``model``. ``apply`` uses all of them: it makes every change of
``accelerate_mllm``, in order.
"""
