"""Fine-tuning in the process that serves: a run in a thread of its own, in the time that steps of requests leave."""
