"""What a person looks at: which patches became one token, layer by layer, in a web page or a small web application.

Read ``prompts`` (the question as the model gets it), ``stages`` (what became of every patch), then ``page`` (one HTML
file for ``mllm-crossget show --html``), or ``session`` and ``app`` (``mllm-crossget ui``). Only ``app`` needs gradio.
"""
