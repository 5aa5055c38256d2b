"""The worker's side of an update of the weights. Imports vLLM: only vLLM imports this."""

from __future__ import annotations

from typing import Any

from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rllava_vllm.receiving import Chunk, Opening


class Receiver(WeightTransferEngine[Opening, Chunk]):  # type: ignore[type-var]
    """Loads weights in the form of a checkpoint, layer by layer as they come, as vLLM's own backends do."""

    init_info_cls = Opening
    update_info_cls = Chunk

    def init_transfer_engine(self, init_info: Opening) -> None:
        """There is nothing to set up."""

    def start_weight_update(self) -> None:
        self._missing = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Chunk) -> None:
        loaded: Any = self.model.load_weights(update_info.pairs())
        if loaded is None:  # a model that does not say what it has loaded
            self._missing = set()
        else:
            self._missing -= loaded

    def finish_weight_update(self) -> None:
        """Raises RuntimeError if a weight was left as it was: it would be of another step, or of none."""
        finalize_layerwise_reload(self.model, self.model_config)
        if self._missing:
            shown = ", ".join(sorted(self._missing)[:3])
            raise RuntimeError(f"{len(self._missing)} weights of vLLM's model were not sent: {shown}")

    def shutdown(self) -> None:
        """There is nothing to let go of."""
