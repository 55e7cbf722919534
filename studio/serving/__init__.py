"""Serving language models with any number of adapters, to programs that speak OpenAI's interface.

requests.py     what is asked and what is answered
adapters.py     names -> adapters of any format, read when they are first asked for
schedulers.py   which waiting request comes next
engine.py       the loop: admission, one forward pass per step, tokens out
app.py          HTTP
pictures.py     pictures with adapters of their own, several requests per forward pass
automatic.py    which adapter suits a request
export.py       configurations for vLLM, Ray Serve and Kubernetes
"""
