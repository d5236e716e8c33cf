"""What `packlight demo` trains: an ordinary training script, run once plain and once under a budget.

The folder holds a user's script, not a part of packlight: `train_gpt.py` imports nothing from packlight, so
that what the demo shows is what `packlight run` does with a script that was never written for it. The command
line runs it by its path in processes of its own and compares the JSON that `--result` writes:

    python train_gpt.py --result plain.json
    packlight run --budget 700MB train_gpt.py --result planned.json
"""
