"""`packlight explain`: a saved plan or run, printed."""

import click

from packlight.report import text


@click.command()
@click.argument("file", metavar="RUN_OR_PLAN.json", type=click.Path(exists=True, dir_okay=False))
def explain(file: str) -> None:
    """Print a saved plan or run: what was chosen, what was expected, what happened."""
    try:
        text.show(text.read_record(file))
    except ValueError as error:
        raise click.UsageError(str(error)) from error
