"""Sparse attention masks: a prompt's layout, masks over it, and kernels that skip what they hide.

    layout = PromptLayout(4096, (ImageSpan(10, 2058), ImageSpan(2060, 4090)))
    mask = heads_mask(layout, ["intra", "sink", "dense", "intra+sink"])
    output = attend(query, key, value, mask)

It needs torch only, and knows no engine.
"""

from __future__ import annotations

from tokenprune.masks.heads import HeadCategories as HeadCategories
from tokenprune.masks.heads import ModelIdentity as ModelIdentity
from tokenprune.masks.heads import Thresholds as Thresholds
from tokenprune.masks.kernels import Prepared as Prepared
from tokenprune.masks.kernels import attend as attend
from tokenprune.masks.kernels import block_mask as block_mask
from tokenprune.masks.layout import ImageSpan as ImageSpan
from tokenprune.masks.layout import PromptLayout as PromptLayout
from tokenprune.masks.layout import image_spans as image_spans
from tokenprune.masks.mask import Blocks as Blocks
from tokenprune.masks.mask import Causal as Causal
from tokenprune.masks.mask import Classes as Classes
from tokenprune.masks.mask import Mask as Mask
from tokenprune.masks.mask import PerHead as PerHead
from tokenprune.masks.mask import Window as Window
from tokenprune.masks.mask import visible_keys as visible_keys
from tokenprune.masks.patterns import category_mask as category_mask
from tokenprune.masks.patterns import heads_mask as heads_mask
from tokenprune.masks.patterns import layer_mask as layer_mask
from tokenprune.masks.pooled import PooledBlocks as PooledBlocks
