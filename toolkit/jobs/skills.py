"""Write the data of the embedded base's skills: for each one file to train on and one to test on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from toolkit import specs
from toolkit.checkpoints.writer import staged
from toolkit.data.rows import write_rows
from toolkit.embedded.skills import SKILLS, rows
from toolkit.names import did_you_mean
from toolkit.specs import Spec
from toolkit.tables import Report, Table


class SkillsSpec(Spec):
    """Which data to write.

    Attributes:
        skills: names; by default all.
        train: rows to train on, of each skill.
        test: rows to test on: other payloads, and other words for the task.
        seed: of the rows.
    """

    skills: tuple[str, ...] = tuple(SKILLS)
    train: Annotated[int, Field(ge=1)] = 2000
    test: Annotated[int, Field(ge=1)] = 200
    seed: int = 0

    @field_validator("skills")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in SKILLS:
                raise ValueError(f"no skill {name!r}{did_you_mean(name, SKILLS)} (known: {', '.join(SKILLS)})")
        return names


def write_skills(
    spec: specs.Source | SkillsSpec, out: str | Path, *, overwrite: bool = False, quiet: bool = False
) -> Report:
    """Write `SKILL.train.jsonl` and `SKILL.test.jsonl` for every skill of the spec into a folder."""
    loaded = specs.load(spec, SkillsSpec)
    found = []
    with staged(Path(out), overwrite=overwrite) as partial:
        for name in loaded.skills:
            train = rows(SKILLS[name], split="train", count=loaded.train, seed=loaded.seed)
            test = rows(SKILLS[name], split="test", count=loaded.test, seed=loaded.seed, phrasing="held_out")
            write_rows(partial / f"{name}.train.jsonl", train)
            write_rows(partial / f"{name}.test.jsonl", test)
            asked, answered = (message["content"] for message in test[0]["messages"])
            found.append([name, len(train), len(test), asked, answered])
    columns = ("skill", "train", "test", "for example", "answer")
    return Report({"path": str(out), "skills": list(loaded.skills)}, [Table(columns, found, str(out))])
