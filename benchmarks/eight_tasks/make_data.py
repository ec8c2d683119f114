"""Make the folder of tasks from public corpora: python -m benchmarks.eight_tasks.make_data OUT. Needs a network.

Seven tasks are corpora that NLTK's index redistributes: sentence polarity, subjectivity, and pros and cons (Pang & Lee;
Liu; CC BY 4.0), TREC questions (Li & Roth), names (Kantrowitz & Ross), RTE 1 to 3 (PASCAL), and ABC news of 2006. The
eighth is the area of the MMLU questions in RouteLLM's repository. Rows that occur twice, or with two labels, are left
out; the rest is shuffled by a fixed seed and dealt to test, validation and training rows in this order.
"""

from __future__ import annotations

import argparse
import csv
import io
import random
import re
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from toolkit.checkpoints.writer import staged
from toolkit.data.rows import write_rows
from toolkit.errors import DataError, MissingError, ToolkitError
from toolkit.progress import track

NLTK = "https://raw.githubusercontent.com/nltk/nltk_data/gh-pages/packages/corpora/{}.zip"
ROUTELLM = "https://github.com/lm-sys/RouteLLM/archive/refs/heads/main.zip"

SIZES = {"test": 1000, "validation": 500, "train": 8000}
"""Most rows of each split; of small corpora a fifth is tested on, and a tenth validated."""

AREAS: dict[str, str] = {
    "stem": "abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science"
    " college_mathematics college_physics computer_security conceptual_physics electrical_engineering"
    " elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science"
    " high_school_mathematics high_school_physics high_school_statistics machine_learning",
    "humanities": "formal_logic high_school_european_history high_school_us_history high_school_world_history"
    " international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory"
    " professional_law world_religions",
    "social": "econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics"
    " high_school_microeconomics high_school_psychology human_sexuality professional_psychology public_relations"
    " security_studies sociology us_foreign_policy",
    "other": "business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing"
    " medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology",
}
"""Areas of MMLU's subjects, as its authors group them."""

Pairs = Iterator[tuple[str, str]]
"""A text and its label."""

LONGEST = 120
"""Words; MMLU's longer passages are left out."""


class Archive:
    """A zip file in memory, whose files are found by the end of their names."""

    def __init__(self, raw: bytes) -> None:
        self.zip = zipfile.ZipFile(io.BytesIO(raw))

    def names(self, end: str) -> list[str]:
        """Return the names of files that end so.

        Raises:
            DataError: there is none.
        """
        found = sorted(name for name in self.zip.namelist() if name.endswith(end))
        if not found:
            raise DataError(f"the archive holds no {end}; its publisher may have changed it")
        return found

    def lines(self, end: str) -> list[str]:
        """Return the lines of a file, without blank ones."""
        text = _decoded(self.zip.read(self.names(end)[0]))
        return [line.strip() for line in text.splitlines() if line.strip()]


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("cp1252", errors="replace")


def _labelled(archive: Archive, files: Mapping[str, str]) -> Pairs:
    for end, label in files.items():
        yield from ((line, label) for line in archive.lines(end))


def polarity(archive: Archive) -> Pairs:
    """Yield sentences of film reviews."""
    return _labelled(archive, {"rt-polarity.pos": "positive", "rt-polarity.neg": "negative"})


def subjectivity(archive: Archive) -> Pairs:
    """Yield sentences of reviews and of plots."""
    return _labelled(archive, {"quote.tok.gt9.5000": "subjective", "plot.tok.gt9.5000": "objective"})


def names(archive: Archive) -> Pairs:
    """Yield first names."""
    return _labelled(archive, {"female.txt": "female", "/male.txt": "male"})


def pros_cons(archive: Archive) -> Pairs:
    """Yield what reviewers of products name as pros and as cons."""
    for end, label in (("IntegratedPros.txt", "pro"), ("IntegratedCons.txt", "con")):
        for line in archive.lines(end):
            yield re.sub(r"</?(Pros|Cons)>", "", line).strip(), label


def trec(archive: Archive) -> Pairs:
    """Yield questions, by the kind of answer that they ask for."""
    for end in ("train.txt", "test.txt"):
        for line in archive.lines(end):
            kind, _, question = line.partition(" ")
            yield question, kind.partition(":")[0]


def rte(archive: Archive) -> Pairs:
    """Yield pairs of a text and a hypothesis, `[SEP]` between them."""
    for name in archive.names(".xml"):
        for pair in ElementTree.fromstring(archive.zip.read(name)).iter("pair"):
            given = (pair.get("value") or pair.get("entailment") or "").upper()
            text, hypothesis = (" ".join((pair.findtext(tag) or "").split()) for tag in ("t", "h"))
            yield f"{text} [SEP] {hypothesis}", "entailment" if given in ("TRUE", "YES") else "not_entailment"


def abc_news(archive: Archive) -> Pairs:
    """Yield sentences of rural and of science news."""
    for end, label in (("rural.txt", "rural"), ("science.txt", "science")):
        for line in archive.lines(end):
            for sentence in re.split(r"(?<=[.!?]) +(?=[A-Z\"'])", line):
                if 8 <= len(sentence.split()) <= 60:
                    yield sentence, label


def mmlu_area(archive: Archive) -> Pairs:
    """Yield questions without their choices, by the area of their subject."""
    for area, subjects in AREAS.items():
        for subject in subjects.split():
            (name,) = archive.names(f"/mmlu_{subject}.csv")
            for row in csv.DictReader(io.StringIO(_decoded(archive.zip.read(name)))):
                question = " ".join(row["prompt"].split("\nA. ")[0].split())
                if len(question.split()) <= LONGEST:
                    yield question, area


TASKS: dict[str, tuple[str, Callable[[Archive], Pairs]]] = {
    "polarity": (NLTK.format("sentence_polarity"), polarity),
    "subjectivity": (NLTK.format("subjectivity"), subjectivity),
    "pros_cons": (NLTK.format("pros_cons"), pros_cons),
    "trec": (NLTK.format("qc"), trec),
    "names": (NLTK.format("names"), names),
    "rte": (NLTK.format("rte"), rte),
    "abc_news": (NLTK.format("abc"), abc_news),
    "mmlu_area": (ROUTELLM, mmlu_area),
}
"""Task -> where its corpus is, and how its rows are read."""


def deal(pairs: Pairs, seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """Deal rows to splits: test, validation, then training rows; none of them is in two."""
    labels: dict[str, set[str]] = {}
    for text, label in pairs:
        labels.setdefault(text, set()).add(label)
    rows = [{"text": text, "label": next(iter(own))} for text, own in labels.items() if text and len(own) == 1]
    random.Random(seed).shuffle(rows)
    test, validation = min(SIZES["test"], len(rows) // 5), min(SIZES["validation"], len(rows) // 10)
    return {
        "test": rows[:test],
        "validation": rows[test : test + validation],
        "train": rows[test + validation :][: SIZES["train"]],
    }


def download(url: str) -> bytes:
    """Return what is at an address.

    Raises:
        MissingError: it cannot be had.
    """
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.read()
    except (urllib.error.URLError, TimeoutError) as error:
        raise MissingError(f"{url}: cannot be downloaded ({getattr(error, 'reason', error)})") from None


def make(out: Path, fetch: Callable[[str], bytes] = download, *, quiet: bool = False) -> None:
    """Write the folder of all tasks; it appears only when it is whole.

    Args:
        out: folder to write.
        fetch: returns the bytes of an address.
        quiet: show no progress.
    """
    with staged(out) as partial, track("tasks", len(TASKS), unit="tasks", quiet=quiet) as progress:
        for name, (url, read) in TASKS.items():
            progress.note(name)
            folder = partial / name
            folder.mkdir()
            for split, rows in deal(read(Archive(fetch(url)))).items():
                write_rows(folder / f"{split}.jsonl", rows)
            progress.advance()


def main(given: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eight_tasks.make_data", description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    try:
        make(parser.parse_args(given).out)
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
