"""`packlight pipeline`: schedules with offload, weighed for a transformer by its shape."""

import sys
from typing import Any

import click

from packlight.budget import BudgetError
from packlight.cli.output import output_file, page_file


@click.command()
@click.option("--model", required=True, help='A transformer by its shape ("llama-13b").')
@click.option("--ranks", "num_ranks", required=True, type=int, help="Ranks of the pipeline.")
@click.option("--chunks", "num_chunks", default=1, show_default=True, help="Stages of each rank.")
@click.option("--microbatches", "num_microbatches", required=True, type=int, help="Of a step.")
@click.option("--seq", "sequence_length", required=True, type=int, help="Tokens of a sequence.")
@click.option("--microbatch-size", default=1, show_default=True, help="Sequences of a microbatch.")
@click.option("--budget", metavar="BYTES", required=True, help="Bytes allowed on each rank's device.")
@click.option("--host-budget", metavar="BYTES", help="Bytes of host memory that each rank may use.")
@click.option("--hardware", metavar="NAME", help='Device of each rank ("a100-80g").')
@click.option("--k", type=float, help="Time to move a layer's activations out and back over that of its compute.")
@click.option("--tflops", type=float, help="Matrix rate that a rank reaches, in Tflop/s.")
@click.option("--keep-elementwise", is_flag=True, help="Norms, activations and dropout are not computed again.")
@click.option("--state-bytes", default=16, show_default=True, help="Of a parameter, with gradient and states.")
@click.option("--all", "every", is_flag=True, help="Print all candidates.")
@click.option("--save", metavar="FILE", help="Write the plan to this JSON file.")
@click.option("--html", metavar="FILE", help="Draw the chosen schedule on this page.")
def pipeline(
    *,
    budget: str,
    host_budget: str | None,
    tflops: float | None,
    keep_elementwise: bool,
    every: bool,
    save: str | None,
    html: str | None,
    **asked: Any,
) -> None:
    """Weigh pipeline schedules with offload for a transformer, and choose the fastest that fits."""
    from packlight.planner.pipelines import PipelineQuestion, plan_pipeline  # takes torch's second, as `run` does
    from packlight.report import pipeline as page

    target = output_file("--save", save)
    drawn = page_file("--html", html, other=target, other_option="--save")
    flops = None if tflops is None else tflops * 1e12
    try:
        question = PipelineQuestion(**asked, flops_per_second=flops, recompute=not keep_elementwise)
        answer = plan_pipeline(question, budget=budget, host_budget=host_budget)
    except BudgetError as error:
        click.echo(f"packlight: {error}", err=True)
        sys.exit(3)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    page.show(answer.plan, answer.rows(every=every))
    if target is not None:
        answer.plan.save(target)
    if drawn is not None:
        page.write_page(drawn, answer.plan, answer.bars())
