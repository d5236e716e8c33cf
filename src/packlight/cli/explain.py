"""`packlight explain`: a saved plan or run, printed, and drawn on a page."""

from pathlib import Path

import click

from packlight.cli.output import page_file
from packlight.report import text


@click.command()
@click.argument("file", metavar="RUN_OR_PLAN.json", type=click.Path(exists=True, dir_okay=False))
@click.option("--html", metavar="FILE", help="Draw what lives over the step on this page.")
def explain(*, file: str, html: str | None) -> None:
    """Print a saved plan or run: what was chosen, what was expected, what happened."""
    target = page_file("--html", html, other=Path(file).absolute(), other_option="RUN_OR_PLAN.json")
    try:
        record = text.read_record(file)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    text.show(record)
    if target is not None:
        from packlight.report import html as page  # of no use without plotly

        page.write(record, target)
        click.echo(f"the page is {target}")
