"""Methods that leave tokens out between the layers of a model of transformers.

A call is read like an unpruned one up to the first stage. `layers` stands in front of the decoder's
layers, `reading` and `continuing` say what it does there in a call that reads a prompt and in one
that goes on from its cache, and `left` is what a cache has to know.
"""
