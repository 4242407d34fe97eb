"""Whatever was imported before this file is no garbage: the collector leaves it alone.

vLLM collects garbage five times while an engine starts and ends. With torch, vLLM and transformers
imported it would look at a million objects each time, which takes most of a tiny engine's start
and end.
"""

from __future__ import annotations

import gc

gc.collect()
gc.freeze()
