"""Methods that leave tokens out inside the language model: FastV, PyramidDrop and SparseVLM.

Each says behind which layers tokens leave, how many, and by what scores; it knows no engine.
`tokenprune_hf.inside` applies them to models of transformers.
"""
