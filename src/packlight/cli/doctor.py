"""`packlight doctor`: what works on this machine, and what the rest costs."""

import json
import sys

import click
from rich.console import Console
from rich.table import Table

from packlight.doctor import Diagnosis, examine

_STYLES = {"works": "green", "limited": "yellow", "untried": "blue", "missing": "red"}


@click.command()
@click.option("--disk", metavar="DIR", help="Folder of the disk tier. Default: the folder for temporary files.")
@click.option("--quick", is_flag=True, help="Import no optional package; say which are installed.")
@click.option("--json", "as_json", is_flag=True, help="Print a record instead of a table.")
def doctor(*, disk: str | None, quick: bool, as_json: bool) -> None:
    """Try all that packlight may use here. Exit status: 0 where it can plan and run, 1 where it cannot."""
    console = Console(stderr=True)
    with console.status("looking at this machine, up to two minutes") as status:

        def tell(doing: str) -> None:
            if console.is_terminal:
                status.update(f"up to two minutes: {doing}")
            else:
                click.echo(f"packlight: {doing}", err=True)

        diagnosis = examine(disk, quick=quick, tell=tell)
    if as_json:
        click.echo(json.dumps(diagnosis.to_dict(), indent=1))
    else:
        Console(emoji=False, highlight=False).print(_table(diagnosis))
    sys.exit(0 if diagnosis.healthy else 1)


def _table(diagnosis: Diagnosis) -> Table:
    verdict = "packlight can plan and run here" if diagnosis.healthy else "something essential is broken here"
    table = Table("part", "state", "what was found, and what it costs", title=verdict, title_justify="left")
    for each in diagnosis.findings:
        what = "\n".join(filter(None, [each.found, each.cost and f"-> {each.cost}"]))
        table.add_row(each.name, f"[{_STYLES[each.status]}]{each.status}[/]", _plain(what))
    return table


def _plain(text: str) -> str:
    """Keep brackets from being read as rich's markup."""
    return text.replace("[", "\\[")
