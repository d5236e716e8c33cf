"""The `packlight` command: run, plan, explain and demo, on training scripts that nobody edits; convert, on checkpoints.

`packlight doctor` looks at the machine. What packlight says of a run goes to standard error, so that a script's own
output stays as it is. Exit status: the script's own; 2 for wrong usage, 3 where no plan fits the budget (nothing was
trained, nothing was written).
"""

import click

from packlight.cli.convert import convert
from packlight.cli.demo import demo
from packlight.cli.doctor import doctor
from packlight.cli.explain import explain
from packlight.cli.pipeline import pipeline
from packlight.cli.training import plan, run

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="packlight")
def main() -> None:
    """Make a PyTorch training script fit a byte budget, and say before the run what to expect."""


for _command in (run, plan, explain, pipeline, convert, demo, doctor):
    main.add_command(_command)
