"""Keys and values in 8 or 4 bits."""

from toolkit.kernels.kv_quant.api import quantize_pages
from toolkit.kernels.kv_quant.cache import QuantizedCache

__all__ = ["QuantizedCache", "quantize_pages"]
