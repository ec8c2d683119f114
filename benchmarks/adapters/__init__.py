"""Adapter methods side by side: `python -m benchmarks.adapters LIST.yaml OUT [--data FOLDER]`.

`LIST.yaml` names methods, tasks and a budget (`spec.py` says how; `methods.yaml` and `beside_peft.yaml` are two lists).
FOLDER holds real tasks as `TASK/{train,validation,test}.jsonl` with rows of `{"text", "label"}`; the embedded base's
skills need none. Printed, and written to `OUT/table.md` and `OUT/results.json`, are trained parameters, peak memory,
CPU time and scores of every method. A run that was stopped goes on when it is started again.
"""
