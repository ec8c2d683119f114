"""Measure what a method must know of data about every model, before anything is merged."""

from __future__ import annotations

from pathlib import Path

from toolkit.merge.plan import Plan
from toolkit.merge.spec import DataSpec
from toolkit.merge.statistics.files import Statistics, StatisticsWriter, is_measured, open_statistics
from toolkit.progress import track


def collect(plan: Plan, folder: Path, *, quiet: bool) -> dict[str, Statistics]:
    """Measure every model that is not measured yet.

    Args:
        plan: of the merge.
        folder: of the unfinished merge, where the statistics are kept.
        quiet: show no progress.

    Returns:
        The statistics of each tensor that has some.

    Raises:
        DataError: rows that cannot be used.
        UnsupportedError: a model that cannot be run.
    """
    if plan.method.statistics is None:
        return {}
    from toolkit.merge.statistics import fisher, gram, through
    from toolkit.merge.statistics.models import examples_of, runnable, tokenizer_of
    from toolkit.models.load import pick_device

    spec, models = plan.spec.data or DataSpec(), plan.inputs.models
    device, tokenizer = pick_device(spec.device), tokenizer_of(plan.inputs.donor)
    files = [own.data or spec.files or [] for own in plan.spec.models or ()]
    context = int(plan.inputs.donor.config.get("max_position_embeddings") or spec.max_length)
    data = [examples_of(own, tokenizer, context, spec) for own in files]
    missing = [i for i in range(len(models)) if not is_measured(folder, i)]
    with track("measuring", sum(len(data[i]) for i in missing), unit="examples", quiet=quiet) as progress:
        if missing and plan.method.statistics == "merged_gram":
            through.measure(plan, folder, data, device, progress)
            missing = []
        for i in missing:
            checkpoint = models[i].weights
            model = runnable(checkpoint, device)
            if plan.method.statistics == "fisher":
                writer = StatisticsWriter(folder, i, fisher.layout(model, checkpoint))
                parts = fisher.measure(model, checkpoint, data[i], spec, progress)
            else:
                grams = gram.measure(model, checkpoint, data[i], progress)
                writer, parts = StatisticsWriter(folder, i, grams.parts()), grams.means()
            for name, values in parts:
                writer.write(name, values.cpu().numpy())
            writer.finish()
    return open_statistics(folder, len(models))
