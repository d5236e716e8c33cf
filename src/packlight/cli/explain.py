"""`packlight explain`: a saved plan or run, printed, and drawn on a page; a memory snapshot of torch, printed."""

from pathlib import Path

import click

from packlight.cli.output import page_file
from packlight.report import snapshot, text


@click.command()
@click.argument("file", metavar="RUN_OR_PLAN.json|SNAPSHOT", type=click.Path(exists=True, dir_okay=False))
@click.option("--html", metavar="FILE", help="Draw what lives over the step on this page.")
def explain(*, file: str, html: str | None) -> None:
    """Print a saved plan or run: what was chosen, what was expected, what happened.

    Of a memory snapshot (torch.cuda.memory._dump_snapshot): what asked for most, and what would free most.

    Raises:
        UsageError: the file is none of these, or is damaged.
    """
    target = page_file("--html", html, other=Path(file).absolute(), other_option="RUN_OR_PLAN.json")
    try:
        _explain(file, target)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _explain(file: str, target: Path | None) -> None:
    if snapshot.is_snapshot(file):
        if target is not None:
            raise ValueError("--html draws plans and runs; torch's own page, memory_viz, draws snapshots")
        snapshot.show_snapshot(snapshot.read_snapshot(file))
        return
    record = text.read_record(file)
    text.show(record)
    if target is not None:
        from packlight.report import html as page  # of no use without plotly

        page.write(record, target)
        click.echo(f"the page is {target}")
