"""Methods that read with the question at one layer of the model's own language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenprune.errors import OptionError
from tokenprune.families.registry import attending_layers, reference_layer
from tokenprune.selectors.frame_sets import FrameSets


@dataclass(frozen=True)
class LayerReading(FrameSets):
    """Base of the methods that use the attention of a reference layer.

    Parameters
    ----------
    layer
        The reference layer, from 0. None: the published one for the published models, else the
        layer at seven tenths of the depth (see `tokenprune.families.registry.reference_layer`).
    """

    layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None and self.layer < 0:
            raise OptionError(
                f"option layer={self.layer} of method {self.name!r} counts from 0; leave it out "
                "for the published layer."
            )

    def check_model(self, config: Any) -> None:
        """Raise unless the language model has the layer, and it attends."""
        text = config.get_text_config()
        reference_layer(
            config.model_type,
            text.num_hidden_layers,
            text.hidden_size,
            self.layer,
            attending_layers(text),
        )
