"""Adapter methods that PEFT does not have: one file each, registered with PEFT.

A file declares

- a dataclass on `AdapterConfig`: the method's fields, as a spec and `adapter_config.json` name them;
- an `AdapterLayer`: `TRAINED` and `STORED`, the names of its tensors; `start`, which makes them; `change`, what the
  adapter adds to a module's output; and where that is a change of weights, `low_rank` or `fold`, else `folds`;
- at its end `register(name, Config, Layer)`.

`docs/adding_an_adapter.md` takes you through one.
"""

import peft  # noqa: F401 - ends by importing every method, so none of them may have begun by then
