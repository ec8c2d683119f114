"""transformers' `generate` and continuous batching, and PEFT's mixed batches (`adapter_names`)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from benchmarks.serving.work import Case, Size


class Generate:
    """One call of `generate` on the whole batch, which is of even length, so nothing is padded."""

    def __init__(self, folder: Path) -> None:
        self.versions = {name: version(name) for name in ("torch", "transformers", "peft")}
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()

    def prepare(self, case: Case) -> None:
        """Nothing is loaded for a case."""

    def run(self, case: Case, size: Size) -> Sequence[Sequence[int]]:
        """Answer the requests of a case."""
        return self._generate(case, size)

    def _generate(self, case: Case, size: Size, **options: Any) -> list[list[int]]:
        ids = torch.tensor(case.prompts(size))
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=case.answer,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=2,
                **options,
            )
        return out[:, case.prompt :].tolist()

    def shares(self, case: Case, size: Size) -> dict[str, float]:
        """Nothing is known."""
        return {}


class Continuous(Generate):
    """transformers' continuous batching, at the settings that were fastest on a CPU."""

    def run(self, case: Case, size: Size) -> Sequence[Sequence[int]]:
        """Answer the requests of a case."""
        pages = case.requests * -(-(case.prompt + case.answer) // 32)
        settings = ContinuousBatchingConfig(
            page_size=32, num_blocks=2 * pages, max_batch_tokens=max(512, case.requests), use_cuda_graph=False
        )
        chosen = GenerationConfig(max_new_tokens=case.answer, do_sample=False, eos_token_id=-1, pad_token_id=2)
        found = self.model.generate_batch(
            case.prompts(size), generation_config=chosen, continuous_batching_config=settings, warmup=False
        )
        ordered = sorted(found.values(), key=lambda output: int(output.request_id.rpartition("_")[2]))
        return [output.generated_tokens for output in ordered]


class Mixed(Generate):
    """PEFT: one adapter by `set_adapter`, several by `adapter_names`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder, self.loaded = folder, 0

    def run(self, case: Case, size: Size) -> Sequence[Sequence[int]]:
        """Answer the requests of a case."""
        if case.adapters == 1:
            self.model.set_adapter("a0")
            return self._generate(case, size)
        return self._generate(case, size, adapter_names=[name or "__base__" for name in case.models])

    def prepare(self, case: Case) -> None:
        """Load the adapters of a case."""
        for index in range(self.loaded, case.adapters):
            path, name = str(self.folder / "adapters" / f"a{index}"), f"a{index}"
            if index == 0:
                self.model = PeftModel.from_pretrained(self.model, path, adapter_name=name).eval()
            else:
                self.model.load_adapter(path, adapter_name=name, low_cpu_mem_usage=True)
        self.loaded = max(self.loaded, case.adapters)


def make(name: str, folder: Path) -> Generate:
    """Return one of them."""
    return {"transformers": Generate, "continuous": Continuous, "PEFT": Mixed}[name](folder)
