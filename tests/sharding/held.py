"""What ranks hold: `torchrun tests/sharding/held.py WHAT FOLDER`; a rank writes FOLDER/RANK.json."""

import contextlib
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

LENGTH = 32


class Decoder(nn.Module):
    """A causal language model on bytes with a tied head, of widths that no number of ranks divides."""

    def __init__(self, width: int = 36, num_blocks: int = 2) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(257, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width + 3, dropout=0.0, batch_first=True)
            for _ in range(num_blocks)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 257, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups, as trainers make them."""
    params = list(model.parameters())
    groups = [{"params": [at for at in params if at.dim() > 1]}, {"params": [at for at in params if at.dim() == 1]}]
    return torch.optim.AdamW(groups, lr=1e-3)


def storages() -> dict[int, torch.UntypedStorage]:
    """Return all storages on the CPU but for scalars, by address, which no other gets while they are held."""
    gc.collect()
    found = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor) and item.device.type == "cpu" and item.layout == torch.strided:
            if type(item) in (Tensor, nn.Parameter) and item.untyped_storage().nbytes() > 64:
                found[item.untyped_storage()._cdata] = item.untyped_storage()
    return found


def new_sizes(before: dict[int, torch.UntypedStorage]) -> list[int]:
    """Return the bytes of each storage that has come since."""
    return [storage.nbytes() for key, storage in storages().items() if key not in before]


def zero(sizes: dict[str, int]) -> list[dict[str, Any]]:
    """Train two steps at each stage and dtype; what lives then, and what was said from shapes."""
    import deepspeed

    from packlight.planner.sharded import state_bytes
    from packlight.sharding import weights_of
    from packlight.sharding.stages import ZeroOptions, zero_sharding
    from packlight.sharding.zero import Engine
    from packlight.step import OptimizerCost

    found = []
    for stage in range(4):
        for dtype in (torch.float32, torch.bfloat16):
            before = storages()
            model = Decoder()
            config = {
                "train_micro_batch_size_per_gpu": 2,
                "zero_optimization": {"stage": stage, **sizes},
                "bf16": {"enabled": dtype is torch.bfloat16},
            }
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config)
            for _ in range(2):
                ids = torch.randint(0, 257, (2, LENGTH))
                loss = functional.cross_entropy(engine(ids).float().flatten(0, 1), ids.flatten())
                engine.backward(loss)
                engine.step()
                del loss, ids
            held = sum(new_sizes(before))
            with torch.device("meta"):
                meta = Decoder().to(dtype)
            options = ZeroOptions(
                stage,
                distributed.get_world_size(),
                reduce_bucket_elements=sizes["reduce_bucket_size"],
                persistent_elements=sizes["stage3_param_persistence_threshold"],
            )
            said = zero_sharding(weights_of(meta, [optimizer_of(meta)]), options)
            cost = OptimizerCost("fp32", 0, 0, 0.0, {name: "fp32" for name, _ in meta.named_parameters()})
            states = 8 * max(sum(share.numel for share in shares) for shares in said.shares)
            assert state_bytes(cost, said) == states + 4 * said.num_flats
            found.append(
                {
                    "stage": stage,
                    "dtype": str(dtype),
                    "held": held,
                    "said": said.parameter_bytes
                    + said.master_bytes
                    + states
                    + said.kept_gradient_bytes
                    + said.buffer_bytes
                    + said.persistent_bytes,
                    "same": Engine(engine).sharding().shares == said.shares,
                }
            )
            engine.destroy()
            del engine, model
    return found


def configured() -> dict[str, Any]:
    """Let DeepSpeed take the config that a plan makes, with packlight's optimiser; what came of it."""
    import deepspeed

    import packlight
    from packlight.planner.request import World
    from packlight.sharding.zero import config

    num_ranks = distributed.get_world_size()
    with torch.device("meta"):
        meta, ids = Decoder(), torch.zeros(2, LENGTH, dtype=torch.long)
    plan = packlight.plan(
        meta,
        ids,
        torch.optim.AdamW(meta.parameters()),
        budget="1GiB",
        hardware="h100-80g",
        world=World(num_ranks, engine="zero", link_bytes_per_second=1e12),
    )
    made = config(plan, microbatch_size=2, base={"gradient_clipping": 1.0})
    model = Decoder()
    optimizer = packlight.AdamW(model.named_parameters(), lr=1e-2, state_format="4bit")
    engine, wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=made)
    ids, losses = torch.randint(0, 257, (2, LENGTH)), []
    for _ in range(4):
        loss = functional.cross_entropy(engine(ids).flatten(0, 1), ids.flatten())
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    zero_config = engine._config.zero_config
    return {
        "stage": plan.sharding.stage if plan.sharding else None,
        "taken_stage": int(zero_config.stage),
        "bucket": int(zero_config.reduce_bucket_size),
        "wanted_bucket": plan.sharding.options["reduce_bucket_elements"] if plan.sharding else None,
        "is_ours": getattr(wrapped, "optimizer", wrapped) is optimizer,
        "clipping": engine.gradient_clipping(),
        "learns": losses[-1] < losses[0],
        "json": json.loads(json.dumps(made)) == made,
    }


class ModelParallel:
    """What DeepSpeed asks of whoever cuts a model over all ranks."""

    def get_model_parallel_rank(self) -> int:
        return distributed.get_rank()

    def get_model_parallel_world_size(self) -> int:
        return distributed.get_world_size()

    def get_model_parallel_group(self) -> Any:
        return distributed.group.WORLD


def residual() -> list[dict[str, int]]:
    """Checkpoint blocks as DeepSpeed does; what lives of their inputs after forward, and what was said."""
    import deepspeed

    from packlight.sharding.residual import Checkpointing, checkpoint_bytes

    num_ranks, shape, num_blocks, found = distributed.get_world_size(), (6, 20, 40), 4, []
    for partitions, is_contiguous in ((False, False), (True, False), (True, True)):
        how = Checkpointing(num_ranks, partitions, is_contiguous=is_contiguous, num_checkpoints=num_blocks + 1)
        blocks = [nn.Sequential(nn.Linear(40, 80), nn.GELU(), nn.Linear(80, 40)) for _ in range(num_blocks)]
        deepspeed.checkpointing.configure(
            ModelParallel(),
            partition_activations=partitions,
            contiguous_checkpointing=is_contiguous,
            num_checkpoints=how.num_checkpoints,
        )
        before = storages()
        hidden = torch.randn(shape, requires_grad=True)
        for block in blocks:
            hidden = deepspeed.checkpointing.checkpoint(block, hidden)
        random_state = torch.get_rng_state().nbytes
        held = (
            sum(size for size in new_sizes(before) if size not in (random_state, 8 * 3 * (num_blocks + 1)))
            - hidden.nbytes
        )
        said = checkpoint_bytes([(shape, torch.float32)], num_blocks, how)
        hidden.sum().backward()
        found.append({"held": held, "said": said.device_bytes})
        deepspeed.checkpointing.reset()
        del hidden, blocks
    return found


def fsdp() -> list[Any]:
    """Cut a model as a plan says; what is found of it, and what was said from shapes."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from packlight.planner.tensors import storage_bytes
    from packlight.sharding import fsdp as cutting
    from packlight.sharding import weights_of

    with torch.device("meta"):
        meta = Decoder()
    num_ranks = distributed.get_world_size()
    units = ["blocks.0", "blocks.1"]
    found = list[dict[str, Any]]()
    for keeps in (False, True):
        model = Decoder()
        for path in units:
            fully_shard(model.get_submodule(path), reshard_after_forward=not keeps)
        fully_shard(model)
        cuts, ranks = cutting.found_cuts(model)
        planned = cutting.planned_cuts(weights_of(meta), units, keeps=keeps)
        said = cutting.sharding_of(planned, num_ranks=num_ranks)
        at_hand = cutting.sharding_of(sorted(cuts, key=lambda cut: cut.module), num_ranks=ranks)
        found.append(
            {
                "held": storage_bytes(model.parameters()),
                "said": said.parameter_bytes,
                "same": at_hand == said,
                "trains": _trains(model),
                "refusal": _refusal_of_world(model),
            }
        )
    half = Decoder()
    fully_shard(half, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    (cut,), _ = cutting.found_cuts(half)
    return [*found, {"gathered": str(cut.gathered_dtype), "kept": cut.is_kept}, *as_planned(), replicated(), nested()]


def replicated() -> str:
    """Cut a model on a mesh of two axes; return why there are no plans for it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from packlight.sharding import fsdp as cutting

    model = Decoder()
    fully_shard(model, mesh=init_device_mesh("cpu", (3, 1), mesh_dim_names=("replicate", "shard")))
    try:
        cutting.found_cuts(model)
    except ValueError as error:
        return str(error)
    return ""


def nested() -> bool:
    """Recompute blocks with a unit inside; tell whether gradients are those of keeping everything, bit for bit."""
    from torch.distributed.fsdp import fully_shard

    import packlight

    def gradients(is_recomputed: bool) -> list[Tensor]:
        torch.manual_seed(5)
        model = Decoder()
        for block in model.blocks:
            fully_shard(block.get_submodule("linear1"))
            fully_shard(block)
        fully_shard(model)
        ids = torch.arange(2 * LENGTH).reshape(2, LENGTH) * 7 % 257
        for _ in range(2):  # in the second FSDP2 knows the order of its units
            with packlight.recompute(model) if is_recomputed else contextlib.nullcontext():
                functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        return [each.grad.to_local() for each in model.parameters()]  # type: ignore[union-attr]

    return all(map(torch.equal, gradients(is_recomputed=True), gradients(is_recomputed=False)))


def as_planned() -> list[dict[str, Any]]:
    """Cut models as plans say that use 16 bits, and host memory; what is found of them."""
    import packlight
    from packlight.planner.request import World
    from packlight.sharding import fsdp as cutting

    def made(precision: str | None, host_budget: str | None, budget: int) -> packlight.Plan:
        with torch.device("meta"):
            meta, ids = Decoder(), torch.zeros(2, LENGTH, dtype=torch.long)
        return packlight.plan(
            meta,
            ids,
            torch.optim.AdamW(meta.parameters()),
            budget=packlight.Budget.of(budget),
            hardware="h100-80g",
            host_budget=host_budget,
            world=World(distributed.get_world_size(), engine="fsdp", precision=precision, link_bytes_per_second=1e12),
        )

    try:
        made(None, "1GiB", 1000)
    except packlight.BudgetError as error:
        assert error.smallest_bytes is not None
        least = error.smallest_bytes
    found = []
    for plan in (made("bf16", None, 2**30), made(None, "1GiB", least)):
        model = Decoder()
        cutting.shard(model, plan)
        cuts, _ = cutting.found_cuts(model)
        assert plan.sharding is not None
        found.append(
            {
                "dtypes": sorted({str(cut.gathered_dtype) for cut in cuts}),
                "units": sorted(cut.module for cut in cuts) == sorted(["", *plan.sharding.units]),
                "offloads": plan.sharding.offloads,
                "policy": type(cutting._groups(model._get_fsdp_state())[0].offload_policy).__name__,  # type: ignore[operator]
                "trains": _trains(model),
            }
        )
    return found


def _refusal_of_world(model: nn.Module) -> str:
    """Ask for a plan that would cut a model once more; return why there is none."""
    import packlight

    try:
        ids = torch.zeros(2, LENGTH, dtype=torch.long)
        packlight.plan(model, ids, torch.optim.AdamW(model.parameters()), budget="1GiB", world=4)
    except ValueError as error:
        return str(error)
    return ""


def _trains(model: nn.Module) -> bool:
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    ids = torch.randint(0, 257, (2, LENGTH))
    for _ in range(4):
        loss = functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[-1] < losses[0]


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    torch.manual_seed(3)
    if what == "zero":
        sizes = {"reduce_bucket_size": 30_000, "stage3_param_persistence_threshold": 200, "sub_group_size": 10**9}
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.logger.setLevel("ERROR")
        deepspeed.init_distributed("gloo")
        found: list[Any] = [*zero(sizes), configured(), residual()]
    else:
        distributed.init_process_group("gloo")
        found = fsdp()
    (folder / f"{distributed.get_rank()}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
