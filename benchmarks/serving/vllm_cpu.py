"""vLLM's CPU build, in the process that measures; run by the Python of an environment that has it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import vllm  # pyright: ignore[reportMissingImports]
from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

from benchmarks.serving.work import POSITIONS, RANK, Case, Size

SLOTS = 17
"""One more than is asked for: with every slot taken, rows without an adapter come out as the last slot's."""


class Vllm:
    """vLLM with LoRA on, without its prefix cache and its compiler."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.versions = folder, {"vllm": vllm.__version__}
        self.model = vllm.LLM(
            model=str(folder / "base"),
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            enable_lora=True,
            max_loras=SLOTS,
            max_lora_rank=RANK,
            max_model_len=POSITIONS,
            enable_prefix_caching=False,
        )

    def prepare(self, case: Case) -> None:
        """Nothing: adapters come with the first request, in the round that is not counted."""

    def run(self, case: Case, size: Size) -> Sequence[Sequence[int]]:
        """Answer the requests of a case."""
        chosen = vllm.SamplingParams(max_tokens=case.answer, temperature=0, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": ids} for ids in case.prompts(size)]
        asked = [name and LoRARequest(name, int(name[1:]) + 1, self._path(name)) for name in case.models]
        found = self.model.generate(prompts, chosen, lora_request=asked, use_tqdm=False)
        return [output.outputs[0].token_ids for output in found]

    def _path(self, name: str) -> str:
        return str(self.folder / "adapters" / name)

    def shares(self, case: Case, size: Size) -> dict[str, float]:
        """Nothing is known."""
        return {}


def make(name: str, folder: Path) -> Vllm:
    """Return it."""
    return Vllm(folder)
