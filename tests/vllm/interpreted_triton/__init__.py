"""A backend of Triton's named ``cpu`` that compiles nothing: kernels run in Triton's interpreter.

vLLM's Model Runner V2 runs on a CPU where Triton has a backend of that name, which the package on
PyPI does not have. Triton finds this one by an entry point (`tests.vllm.runner_v2`), and with
``TRITON_INTERPRET=1`` never asks it for more than that it is there.
"""
