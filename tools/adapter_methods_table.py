"""Write the table of adapter methods into docs/training.md, from what PEFT and the toolkit's own files say.

python tools/adapter_methods_table.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from toolkit.adapters import catalogue
from toolkit.tables import Table

DOCUMENT = Path(__file__).parent.parent / "docs" / "training.md"
BEGIN, END = "<!-- methods -->\n", "<!-- end of methods -->"

SHARED = (
    "target_modules exclude_modules layers_to_transform layers_pattern modules_to_save bias fan_in_fan_out"
    " init_weights token_dim num_transformer_submodules num_attention_heads num_layers"
).split()
"""Fields that say where an adapter sits, or that most methods have; they are left out of the table."""

WHAT = {
    "adalora": "LoRA in the form of an SVD; ranks move to the modules that need them (2303.10512)",
    "adamss": "trains subspaces of each weight, found by SVD and clustering",
    "adaption_prompt": "LLaMA-Adapter: gated prompts in the attention of the last layers (2303.16199)",
    "beft": "trains a bias of the value projections alone (2509.15974)",
    "boft": "turns weights by a product of sparse orthogonal matrices (2311.06243)",
    "c3a": "adds block-circular convolutions (2407.19342)",
    "cartridge": "trains the keys and values of virtual tokens themselves",
    "cpt": "context-aware prompt tuning: starts from examples and stays near them (2410.17222)",
    "deft": "replaces a subspace of each weight by new content",
    "delora": "LoRA with direction and strength apart (2503.18225)",
    "fourierft": "trains a few coefficients of the change's Fourier transform (2405.03003)",
    "frod": "trains sparse coefficients in a base that all layers share",
    "glora": "generalised LoRA: scales and shifts weights, activations and biases (2306.07967)",
    "gralora": "LoRA in blocks, each of its own low rank (2505.20355)",
    "hira": "multiplies each weight, entry by entry, with a low-rank matrix",
    "hra": "turns weights by a chain of Householder reflections (2405.17484)",
    "ia3": "rescales keys, values and the inside of the MLP; very few parameters (2205.05638)",
    "lily": "low-rank factors shared between layers, mixed by a router (2407.09946)",
    "ln_tuning": "trains the norms alone (2312.11420)",
    "loha": "the entry-wise product of two low-rank matrices (2108.06098)",
    "lokr": "a Kronecker product with a low-rank factor (2309.14859)",
    "lora": "adds a product of two low-rank matrices; also DoRA, rsLoRA and others by its fields (2106.09685)",
    "miss": "shares one small matrix over slices of each weight (2409.15371)",
    "multitask_prompt_tuning": "a prompt that tasks share, and a low-rank change of it for each (2303.02861)",
    "oft": "turns weights by block-diagonal orthogonal matrices (2306.07280)",
    "osf": "trains each weight outside its largest singular directions, which keep what is known (2504.07097)",
    "p_tuning": "virtual tokens that come out of a small network (2103.10385)",
    "peanut": "a change of each weight that a small network makes of the weight (2410.01870)",
    "poly": "an inventory of LoRAs, mixed for each task (2202.13914); with n_splits, per head (2211.03831)",
    "prefix_tuning": "virtual tokens as keys and values of every layer (2101.00190)",
    "prompt_tuning": "virtual tokens before the input (2104.08691)",
    "psoft": "turns weights inside their principal subspace",
    "pvera": "VeRA with learned noise (2512.07703)",
    "randlora": "sums of random low-rank matrices with trained scales, of full rank (2502.00987)",
    "road": "turns pairs of features (2409.00119)",
    "shadow": "a small network beside the model that corrects its layers",
    "shira": "trains a sparse set of each weight's entries (2406.13175)",
    "supertuning": "trains the entries of largest magnitude (2607.09287)",
    "tinylora": "a handful of numbers, spread over all layers by fixed random tensors (2602.04118)",
    "trainable_tokens": "trains the embeddings of chosen tokens alone",
    "unilora": "one trained vector, spread over all LoRA factors by a fixed map (2506.00799)",
    "vblora": "LoRA factors composed of vectors of a shared bank (2405.15179)",
    "vera": "fixed random factors that all layers share, and trained scales (2310.11454)",
    "waveft": "trains a few wavelet coefficients of the change",
    "xlora": "mixes trained LoRAs anew for every token and layer (2402.07148)",
}
"""One line on each method of PEFT, with its paper on arXiv."""


def table() -> str:
    """Return one row per method: what it does, its fields, and whether rows can be packed for it."""
    rows = []
    for name in catalogue.names():
        method = catalogue.find(name)
        if method is None:
            continue
        required = [field for field in catalogue.REQUIRED if field in method.types and field not in method.optional]
        fields = [f"`{f}`" + "\\*" * (f in required) for f in method.types if f not in SHARED]
        packs = "" if method.virtual_tokens or name == "lily" else "yes"
        rows.append([f"`{name}`", what(method).replace("|", "\\|"), ", ".join(fields), packs])
    return Table(("method", "what it does", "fields of its own", "packs"), rows).to_markdown() + "\n"


def what(method: catalogue.Method) -> str:
    """Return one line on a method."""
    if method.name in WHAT:
        return WHAT[method.name]
    text = (sys.modules[method.config.__module__].__doc__ or "").split("\n\n")[0]
    return " ".join(text.split()).rstrip(".")


def written(text: str) -> str:
    """Return the document with a fresh table."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}{table()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
