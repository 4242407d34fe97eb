"""What a worker chose, told to the test: mixed into vLLM's own worker class by its name."""

from __future__ import annotations

from typing import Any


class Recording:
    """Methods that `LLM.collective_rpc` calls in the worker."""

    model_runner: Any

    def start_recording(self) -> None:
        """Note every selection from here on."""
        chooser = self.model_runner.get_model()._pruner.chooser
        self.seen: list[list[list[int]]] = []
        if not hasattr(chooser, "plain_choose"):
            chooser.plain_choose = chooser.choose

        def choose(*arguments: Any) -> Any:
            chosen = chooser.plain_choose(*arguments)
            self.seen += [[one.kept.tolist() for one in of_item] for of_item in chosen]
            return chosen

        chooser.choose = choose

    def recorded(self) -> list[list[list[int]]]:
        """Return kept indices: one list for each image or video, in it one for each segment."""
        return self.seen

    def start_noting_positions(self) -> None:
        """Note the positions with which the language model is called from here on."""
        pruner = self.model_runner.get_model()._pruner
        self.positions: list[list[list[int]]] = []
        if not hasattr(pruner, "plain_positions"):
            pruner.plain_positions = pruner.positions

        def positions(given: Any) -> Any:
            moved = pruner.plain_positions(given)
            self.positions.append(moved.reshape(-1, moved.shape[-1]).tolist())
            return moved

        pruner.positions = positions

    def noted_positions(self) -> list[list[list[int]]]:
        """Return them, step by step: in each a list for each axis."""
        return self.positions

    def encode_together(self) -> None:
        """Run the encoder on as many images at once as vLLM hands over."""
        self.model_runner.get_model()._pruner._most_rows = 10**9

    def memory(self) -> dict[str, int]:
        """Return how many encoded images the worker still holds, and how many requests."""
        runner = self.model_runner
        return {"images": len(runner.encoder_cache), "requests": len(runner.requests)}

    def rotary_length(self) -> int:
        """Return how many positions the language model's rotary table has."""
        lengths = [
            module.cos_sin_cache.shape[0]
            for module in self.model_runner.get_model().get_language_model().modules()
            if hasattr(module, "cos_sin_cache")
        ]
        return int(max(lengths))
