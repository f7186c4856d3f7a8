"""Tasks: `generated` and `text` say what a task is, one short file each holds one, `kinds` lists them.

`prepared.prepare_task` is the way in; `loader` makes batches of examples.
"""
