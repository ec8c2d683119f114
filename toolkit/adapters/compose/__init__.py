"""Put adapters of any kinds together on one model: stacked, averaged, fused, or each for its own rows.

What is put together are *outputs*: at every module that an adapter sits on, the difference that it makes to what the
module returns. So a LoRA, an IA3, a bottleneck and a decomposition of the weight mix alike.
"""

import peft  # noqa: F401 - ends by importing the methods that are made of this package, so none may have begun by then

from toolkit.adapters.compose.run import compose, replicate

__all__ = ["compose", "replicate"]
